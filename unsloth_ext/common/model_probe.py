"""A trial text: what an attach asks of a model, in place of trusting its class's name."""

import torch
from torch import nn

from .wrapping import backbone_of


TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}  # of states, by dtype; of narrower ones below
NARROW = 0.1


def trial_ids(model: nn.Module, length: int) -> torch.Tensor:
    """(1, length) long: random tokens, the same each time; torch's own generator is not drawn from."""
    weight = backbone_of(model).get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    return torch.randint(weight.shape[0], (1, length), generator=draw).to(weight.device)


def same_states(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two computations of the same hidden states agree, but for rounding: by the norm of their difference. NaN in
    both, which is named where it does harm, is no difference."""
    if ours.shape != theirs.shape or not torch.equal(ours.isnan(), theirs.isnan()):
        return False
    tolerance = TOLERANCE.get(theirs.dtype, NARROW)
    ours, theirs = (x.double().masked_fill(x.isnan(), 0) for x in (ours, theirs))
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())
