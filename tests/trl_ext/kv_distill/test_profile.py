"""What a profile says of attention, against a plain reference."""

import pytest
import torch

from trl_ext.kv_distill.profile import profile_alignment
from unsloth_ext import AttentionShape, create_structured_aligner


def test_entropy_is_of_real_tokens_alone():
    """The mean over each row's own queries and heads, 1e-5: however many pads there are and whatever is in them."""
    shape = AttentionShape(2, 4, 2, 8)
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2, 2, 9, 8) for _ in range(2))
    q = 2 * torch.randn(2, 2, 4, 9, 8)
    segments = torch.tensor([[0] * 3 + [1] * 4 + [2] * 2, [0, 1, 2, -1, -1, -1, -1, -1, -1]])
    found = profile_alignment(create_structured_aligner(shape, shape), (k, v, q), (k, v, q), segments)
    entropies = []
    for row, length in ((0, 9), (1, 3)):
        keys = k[row, :, :, :length].repeat_interleave(2, dim=1)
        scores = q[row, :, :, :length] @ keys.transpose(-1, -2) / 8**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        entropies.append(torch.distributions.Categorical(logits=scores).entropy().flatten())
    wanted = torch.cat(entropies).mean().item()
    assert found.metrics["entropy_teacher"] == pytest.approx(wanted, abs=1e-5)
