"""What stands in place of a state: zeros, another row's, noise of the same norm."""

import torch

from unsloth_ext.common.ablations import ABLATIONS


def test_each_is_what_it_says():
    x = torch.randn(4, 3, 8)
    assert not ABLATIONS["zero"](x).any()
    assert torch.equal(ABLATIONS["shuffle"](x), x[[3, 0, 1, 2]])
    noise = ABLATIONS["noise"](x)
    torch.testing.assert_close(noise.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    assert torch.nn.functional.cosine_similarity(noise.flatten(), x.flatten(), dim=0).abs() < 0.5


def test_interpolation_is_halfway_to_another_row():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(ABLATIONS["interpolate"](x), (x + x[[2, 0, 1]]) / 2)
    assert torch.equal(ABLATIONS["interpolate"](x[:1]), x[:1])
