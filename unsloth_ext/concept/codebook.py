"""Initialisation of the codebook from a model's own states (ours).

With it the middle layers read from the first step nearly what they read without concepts, and the head can tell
codewords apart. Logits of random weights would be lost in their Gumbel noise.
"""

import torch
from torch import nn

from .config import OnlineConceptConfig


CONFIDENCE = 0.9  # mean probability of the most likely codeword; more would leave no gradient between codewords
ROUNDS = 15  # of k-means
AT_ONCE = 4096  # states whose logits are in memory at once
SAME = 1e-5  # states closer than this share of the mean square count as equal, since distances have rounding errors


@torch.no_grad()
def set_codebook(backbone: nn.Module, states: torch.Tensor, seed: int = 0) -> None:
    """Initialise head and embedding in place: codewords are the centres m of k-means on the states.

    Their logits are beta (h m - |m|^2 / 2), those of a mixture of equal spheres. beta is chosen so that the most likely
    codeword has a mean probability of 0.9.

    With several codebooks, each gets every C-th principal component of the states, so that their embeddings add up to
    the state. `<NULL>` has the same logit everywhere: the mean of the log-sum-exp over the codewords of the first
    codebook. The entropy segmenter does not compare the two, so for it the logit is unchanged.

    Args:
        backbone: the decoder with the concept modules.
        states (n, d): floating point, inputs of the head.
        seed: the seed of k-means.

    Raises:
        ValueError: there are fewer different states than codewords.
    """
    with torch.autocast(states.device.type, enabled=False):  # a trainer's bf16 is too coarse for distances
        _set_codebook(backbone, states.float(), seed)


def _set_codebook(backbone: nn.Module, states: torch.Tensor, seed: int) -> None:
    config: OnlineConceptConfig = backbone.concept_config
    head, embedding = backbone.concept_head, backbone.concept_embedding
    generator = torch.Generator(states.device).manual_seed(seed)
    components = torch.linalg.eigh(states.T.cov()).eigenvectors.flip(-1) if config.num_codebooks > 1 else None
    for c in range(config.num_codebooks):
        basis = None if components is None else components[:, c :: config.num_codebooks]
        points = states if basis is None else states @ basis
        centres = kmeans(points, config.num_concepts, generator)
        beta = sharpness(points, centres)
        if c == 0 and config.segmenter != "entropy":
            head.weight[-1] = 0
            head.bias[-1] = mean_together(points, centres, beta)
        codes = slice(c * config.num_concepts, (c + 1) * config.num_concepts)
        head.bias[codes] = (-beta / 2 * centres.square().sum(-1)).to(head.bias.dtype)
        centres = centres if basis is None else centres @ basis.T
        head.weight[codes] = (beta * centres).to(head.weight.dtype)
        embedding.weight[codes] = centres.to(embedding.weight.dtype)


def kmeans(points: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Compute the centres (number, d) of points (n, d) by k-means++ (Arthur and Vassilvitskii 2007) and Lloyd's
    iterations.

    scikit-learn would add a dependency and run on the CPU. This version runs on the device of the points, and reports
    too few different points.

    Raises:
        ValueError: there are fewer different points than centres.
    """
    squares = points.square().sum(-1)
    same = SAME * squares.mean()
    found = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
    seeds, distance = [found], torch.full_like(squares, torch.inf)
    while len(seeds) < number:
        distance = distance.minimum(squares + found.square().sum() - 2 * (points @ found[0]))
        distance[distance <= same] = 0
        if not distance.any():
            raise ValueError(
                f"num_concepts={number}: codewords are made from different hidden states, and the training texts have "
                f"only {len(seeds)}; lower num_concepts, or set codebook_init='random'"
            )
        found = points[torch.multinomial(distance, 1, generator=generator)]
        seeds.append(found)
    centres = torch.cat(seeds)
    for _ in range(ROUNDS):
        nearest = torch.cat([affinity(part, centres).argmax(-1) for part in points.split(AT_ONCE)])
        counts = nearest.bincount(minlength=number)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def affinity(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return (n, number) values that are largest where the distance is smallest."""
    return points @ centres.T - centres.square().sum(-1) / 2


def sharpness(points: torch.Tensor, centres: torch.Tensor) -> float:
    """Return the beta for which the mean largest softmax of beta times the affinity is `CONFIDENCE`, by bisection in
    log10.
    """
    sample = points[:: max(1, len(points) // AT_ONCE)]
    found = affinity(sample, centres)
    scale = found.std().log10().item()
    low, high = -scale - 6, -scale + 6
    for _ in range(50):
        middle = (low + high) / 2
        sure = (10**middle * found).softmax(-1).amax(-1).mean() > CONFIDENCE
        low, high = (low, middle) if sure else (middle, high)
    return 10**middle


def mean_together(points: torch.Tensor, centres: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the mean over points of log sum exp over the centres."""
    parts = points.split(AT_ONCE)
    return sum((beta * affinity(part, centres)).logsumexp(-1).sum() for part in parts) / len(points)
