"""Trial texts with which attaching tests a model, instead of trusting the name of its class."""

import torch
from torch import nn

from .wrapping import backbone_of


# Relative tolerances, by the dtype of the states; NARROW is for narrower dtypes
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
NARROW = 0.1


def trial_ids(model: nn.Module, length: int) -> torch.Tensor:
    """Return (1, length) long: random tokens, the same each time. The global generator is not used."""
    weight = backbone_of(model).get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    return torch.randint(weight.shape[0], (1, length), generator=draw).to(weight.device)


def same_states(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two computations of the same hidden states agree up to rounding.

    The norm of the difference is compared. NaN in both is no difference here; the code that NaN harms reports it.

    Args:
        ours (...): floating point.
        theirs (...): floating point. Its dtype sets the tolerance.

    Returns:
        True if they agree.
    """
    if ours.shape != theirs.shape or not torch.equal(ours.isnan(), theirs.isnan()):
        return False
    tolerance = TOLERANCE.get(theirs.dtype, NARROW)
    ours, theirs = (x.double().masked_fill(x.isnan(), 0) for x in (ours, theirs))
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())
