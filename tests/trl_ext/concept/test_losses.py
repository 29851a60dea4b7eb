"""The terms beside cross-entropy, against their definitions."""

import math

import pytest
import torch

from trl_ext.common.all_reduce import all_reduce_sum
from trl_ext.common.codeword_usage import usage_kl_to_uniform
from trl_ext.concept.config import ConceptConfig
from trl_ext.concept.losses import ratio_loss
from trl_ext.concept.trainer import shift


@pytest.mark.parametrize("target", [2.0, 4.0, 7.5])
def test_the_ratio_loss_is_least_at_its_target(target):
    """1 at F = G = 1 / R, 1e-12; its slope in G is there 0 by F, and pulls back on either side."""
    at = torch.tensor(1 / target, dtype=torch.float64)
    assert abs(ratio_loss(at, at, target) - 1) <= 1e-12
    for made, sign in ((1 / target + 0.1, 1), (1 / target - 0.1, -1)):
        p = torch.tensor(made, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(ratio_loss(p.detach(), p, target), p)[0]
        assert slope * sign > 0
    assert ratio_loss(torch.tensor(1.0), torch.tensor(1.0), target) == pytest.approx(target)


def test_usage_is_the_kullback_leibler_divergence():
    """1e-12 against torch's own; 0 for uniform use, log V for one codeword; the mean over codebooks."""
    use = torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    share = use / use.sum(-1, keepdim=True)
    plain = torch.nn.functional.kl_div(torch.full_like(share, math.log(1 / 8)), share, reduction="sum") / 3
    assert abs(usage_kl_to_uniform(use) - plain) <= 1e-12
    assert abs(usage_kl_to_uniform(torch.ones(2, 5))) <= 1e-6
    assert usage_kl_to_uniform(torch.eye(4, dtype=torch.float64)[:1]) == pytest.approx(math.log(4))


def test_sums_over_processes_have_the_gradient_that_their_mean_makes_whole():
    """Three processes written out: the mean of their gradients is that of the whole, 1e-12."""
    x = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.0, 2.5, -3.0)]
    shared = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    local = [shared * v**2 for v in x]
    whole = torch.stack([v.detach() for v in local]).sum()
    gradients = [
        torch.autograd.grad(all_reduce_sum(v, lambda _: whole, 3).square(), shared, retain_graph=True)[0] for v in local
    ]
    assert all(all_reduce_sum(v, lambda _: whole, 3) == whole for v in local)
    wanted = torch.autograd.grad(sum(local).square(), shared)[0]
    assert abs(sum(gradients) / 3 - wanted) <= 1e-12


@pytest.mark.parametrize("segmenter, target", [("null", 4.0), ("threshold", 4.0), ("threshold", 2.5)])
def test_the_null_bias_is_moved_so_that_one_in_r_fires(segmenter, target):
    """Within one token in a thousand, of 10,000."""
    args = ConceptConfig(output_dir="x", segmenter=segmenter, target_ratio=target, use_cpu=True, bf16=False)
    logit = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moved = logit - shift(logit, args)
    made = (moved > 0).float().mean() if segmenter == "null" else moved.sigmoid().mean()
    assert abs(made - 1 / target) <= 1e-3
