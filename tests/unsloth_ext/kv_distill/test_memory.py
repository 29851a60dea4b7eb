"""No map of attention of T x T is made: not where keys and queries are taken, not where attention is compared."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from unsloth_ext import captured_kvq
from unsloth_ext.kv_distill import loss as loss_module
from unsloth_ext.kv_distill.loss import attention_kl


class Largest(TorchDispatchMode):
    """Elements of the largest tensor with two dimensions of `times` or more."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.maps = times, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        out = call(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and sum(size >= self.times for size in x.shape) >= 2:
                self.maps = max(self.maps, x.numel())
        return out


def test_capturing_makes_none():
    """300 tokens, rows of two lengths; width, words and heads are below 300. (T, T) alone is the causal mask of a batch."""
    model = tiny.model("qwen3")
    ids = torch.randint(3, 40, (2, 300))
    mask = torch.ones_like(ids)
    mask[1, 250:] = 0
    with Largest(300) as largest, captured_kvq(model) as found:
        model(input_ids=ids, attention_mask=mask)
        sum(x.square().sum() for kvq in found.values() for x in kvq).backward()
    heads = model.config.num_attention_heads
    assert largest.maps < 2 * heads * 300 * 300


def test_comparing_makes_a_few_rows_at_a_time(monkeypatch):
    """Forward and backward, 8 rows of 64."""
    monkeypatch.setattr(loss_module, "MAP_ELEMENTS", 2 * 4 * 64 * 8)
    torch.manual_seed(0)
    s_q, t_q = (torch.randn(2, 1, 4, 64, 6, requires_grad=True) for _ in range(2))
    s_k, t_k = (torch.randn(2, 1, 2, 64, 6, requires_grad=True) for _ in range(2))
    with Largest(64) as largest:
        attention_kl(s_q, s_k, t_q, t_k, torch.ones(2, 64, dtype=torch.bool), 1.0).backward()
    assert largest.maps == 0 and all(x.grad.abs().max() > 0 for x in (s_q, s_k, t_q, t_k))
    monkeypatch.setattr(loss_module, "MAP_ELEMENTS", 2**24)
    with Largest(64) as largest:
        attention_kl(s_q, s_k, t_q, t_k, torch.ones(2, 64, dtype=torch.bool), 1.0).backward()
    assert largest.maps == 2 * 4 * 64 * 64  # this test does see one
