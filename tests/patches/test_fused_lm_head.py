"""The torch twin of TRL's Triton head against a dense reference, value and gradient."""

import pytest
import torch

import patches
from patches import fused_lm_head


OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def reference(hidden, weight, bias, targets, temperature, softcap, scale):
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    chosen = p[torch.arange(len(targets)), targets].log()
    return chosen, -(p * p.log()).sum(-1), p.pow(2).sum(-1).log(), z.mean(-1), z.argmax(-1) == targets


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap, scale, temperature", [(None, 1.0, 1.0), (2.0, 0.5, 0.7)])
@pytest.mark.parametrize("chunk", [2048, 7])
def test_values_and_gradients(monkeypatch, bias, softcap, scale, temperature, chunk):
    """fp64, N = 20 in one chunk or in three with a rest: 1e-10."""
    monkeypatch.setattr(fused_lm_head, "TOKENS_PER_CHUNK", chunk)
    import trl.trainer.utils as trl_utils

    hidden = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(11, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(11, (20,))
    leaves = [x for x in (hidden, weight, b) if x is not None]
    with patches.applied("fused_lm_head"):
        found = trl_utils._ChunkedLogProbFunction.apply(
            hidden, weight, b, targets, temperature, 8, softcap, scale, OUTPUTS
        )
    expected = reference(hidden, weight, b, targets, temperature, softcap, scale)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.to(theirs.dtype), theirs, rtol=1e-5, atol=1e-6)
    mix = torch.randn(2, 20, dtype=torch.float64)
    grads = [
        torch.autograd.grad((mix * torch.stack(x[:2])).sum(), leaves, retain_graph=True) for x in (found, expected)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_computed():
    import trl.trainer.utils as trl_utils

    with patches.applied("fused_lm_head"):
        out = trl_utils._ChunkedLogProbFunction.apply(
            torch.randn(3, 4), torch.randn(5, 4), None, torch.tensor([0, 1, 2]), 1.0, 8, None, 1.0, ("log_probs",)
        )
    assert out[0].shape == (3,) and out[1:] == (None, None, None, None)


def test_without_triton_none_comes_back(monkeypatch):
    """TRL's name is None then; while the patch is applied, a CPU has the twin and other devices an error."""
    import trl.trainer.utils as trl_utils

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", None)
    before = patches.status()["fused_lm_head"].applied  # another test may have trained
    with patches.applied("fused_lm_head"), patches.applied("fused_lm_head"):
        status = patches.status()["fused_lm_head"]
        assert status.live and status.applied == before + 1
        args = (torch.randn(5, 4), None, torch.tensor([0, 1, 2]), 1.0, 8, None, 1.0, ("log_probs",))
        assert trl_utils._ChunkedLogProbFunction.apply(torch.randn(3, 4), *args)[0].shape == (3,)
        with pytest.raises(RuntimeError, match="needs Triton"):
            trl_utils._ChunkedLogProbFunction.apply(torch.randn(3, 4, device="meta"), *args)
    assert trl_utils._ChunkedLogProbFunction is None
