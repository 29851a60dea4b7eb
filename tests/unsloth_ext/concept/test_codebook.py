"""Codewords out of states, on states whose clusters are known."""

import math

import pytest
import torch

from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept.codebook import kmeans, set_codebook, sharpness

from .test_forward import V, model
from .test_gate import choose


def generator():
    return torch.Generator().manual_seed(0)


def test_kmeans_finds_clusters_that_are_apart():
    """Each centre is the mean of one cluster, 1e-9; also of one with a quarter of the points."""
    middles = 50 * torch.randn(7, 5, dtype=torch.float64, generator=generator())
    sizes = [400, 400, 100, 400, 400, 400, 400]
    clusters = [m + torch.randn(n, 5, dtype=torch.float64, generator=generator()) for m, n in zip(middles, sizes)]
    points = torch.cat(clusters)[torch.randperm(sum(sizes), generator=generator())]
    found = kmeans(points, 7, generator())
    wanted = torch.stack([cluster.mean(0) for cluster in clusters])
    distance = torch.cdist(found, wanted)
    assert sorted(distance.argmin(1).tolist()) == list(range(7)) and distance.amin(1).max() <= 1e-9


@pytest.mark.parametrize("codebooks", [1, 2])
def test_codewords_are_the_states_and_the_head_tells_them_apart(codebooks):
    """Of V, or V x V, different states in two planes of 32 dimensions: embedding(argmax) is the state (1e-5); the likeliest
    codeword has 0.9 (0.005); as much is concept as `<NULL>` (1e-5), whose logit is the same everywhere."""
    net = backbone_of(model("qwen3", gate="factorised", num_codebooks=codebooks)).float().eval()
    planes = torch.linalg.qr(torch.randn(32, 4, generator=generator())).Q.T
    round_ = torch.arange(V) * 2 * math.pi / V
    circle = lambda a, b: a * round_.cos()[:, None] * planes[0] + b * round_.sin()[:, None] * planes[2]  # noqa: E731
    other = (
        4 * round_.cos()[:, None] * planes[1] + 2 * round_.sin()[:, None] * planes[3]
    )  # variances 5, 4, 3, 2 squared
    states = circle(5, 3) if codebooks == 1 else (circle(5, 3)[:, None] + other).flatten(0, 1)
    set_codebook(net, states.repeat(5, 1))
    choice = choose(net, states[None])
    assert choice.logits.dtype == torch.float32
    codes = choice.logits[0, :, :-1].unflatten(-1, (codebooks, V))
    assert (net.concept_embedding(codes.argmax(-1)) - states).abs().max() <= 1e-5
    assert (codes.softmax(-1).amax(-1).mean(0) - 0.9).abs().max() <= 0.005
    assert abs(choice.logit.mean()) <= 1e-5
    assert choice.logits[0, :, -1].unique().numel() == 1


def test_sharpness_among_centres_that_the_points_do_not_share_alike():
    """The likeliest centre has 0.9 (1e-4) in the mean over the points."""
    points = torch.randn(40, 6, dtype=torch.float64, generator=generator())
    centres = 2 * torch.randn(7, 6, dtype=torch.float64, generator=generator())
    beta = sharpness(points, centres)
    likely = (-beta / 2 * torch.cdist(points, centres).square()).softmax(dim=1).max(dim=1).values
    assert abs(likely.mean() - 0.9) <= 1e-4


def test_the_entropy_segmenter_keeps_its_threshold():
    net = backbone_of(model("qwen3", segmenter="entropy", gate="factorised")).float()
    weight, bias = net.concept_head.weight[-1].clone(), net.concept_head.bias[-1].clone()
    before = net.concept_head.weight[0].clone()
    set_codebook(net, torch.randn(200, 32, generator=generator()))
    assert torch.equal(net.concept_head.weight[-1], weight) and net.concept_head.bias[-1] == bias
    assert not torch.equal(net.concept_head.weight[0], before)


def test_fewer_states_than_codewords_are_refused():
    net = backbone_of(model("qwen3")).float()
    states = torch.randn(V - 1, 32, generator=generator()).repeat(9, 1)
    with pytest.raises(ValueError, match=f"num_concepts={V}: .*the training texts have only {V - 1}; lower"):
        set_codebook(net, states)


def test_a_trainers_autocast_changes_nothing():
    """Bit for bit."""
    made = []
    for enabled in (False, True):
        net = backbone_of(model("qwen3", num_codebooks=2)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            set_codebook(net, torch.randn(200, 32, generator=generator()))
        made.append((net.concept_head.weight, net.concept_head.bias, net.concept_embedding.weight))
    assert all(torch.equal(a, b) for a, b in zip(*made))
