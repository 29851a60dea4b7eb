"""What counts as the same states on a trial text."""

import pytest
import torch

from unsloth_ext.common.model_probe import same_states


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_states_are_the_same_but_for_rounding_whatever_their_size(size, dtype, tolerance):
    """The norm of the difference is at most 1e-3 of theirs, in narrow dtypes a tenth."""
    theirs = size * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for share, same in ((0.8, True), (1.25, False)):
        assert same_states(theirs.double() * (1 + share * tolerance), theirs.to(dtype)) is same
    assert not same_states(theirs[:1], theirs)
    broken = theirs.clone()
    broken[0, 0] = torch.nan
    assert same_states(broken, broken) and not same_states(broken, theirs) and not same_states(theirs, broken)
