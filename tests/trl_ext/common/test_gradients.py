"""Gradients of two processes, one of them played by a function; the real ones are in test_two_processes."""

import torch
from torch import nn

from trl_ext.common import gradients


def test_means_over_processes(monkeypatch):
    """Of parameters that one, the other, both or neither has a gradient for, in several buckets and dtypes; exact."""
    monkeypatch.setattr(gradients, "BUCKET", 8)
    shapes = [(3, 2), (5,), (4, 2), (2,), (6,)]
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.float32]
    ours, theirs = ([nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes)] for _ in range(2))
    for side, which in ((ours, (0, 1, 2)), (theirs, (1, 2, 4))):
        for i in which:
            side[i].grad = torch.randn(shapes[i]).to(dtypes[i])
    before = [[None if p.grad is None else p.grad.clone() for p in side] for side in (ours, theirs)]
    sent, calls = [], 0

    def keep(x):
        sent.append(x.clone())
        return x

    # Once to learn what the other would send, which depends on what both have; then for real
    have = [(a.grad is not None) or (b.grad is not None) for a, b in zip(ours, theirs)]
    gradients.average_gradients(theirs, lambda x: keep(x) if len(sent) else keep(torch.tensor(have).float()))

    def reduce(x):
        nonlocal calls
        calls += 1
        return (x + (torch.tensor([p is not None for p in before[1]]).float() if calls == 1 else sent[calls - 1])) / 2

    gradients.average_gradients(ours, reduce)
    assert calls == len(sent) > 3
    for parameter, a, b in zip(ours, *before):
        if a is None and b is None:
            assert parameter.grad is None
            continue
        a, b = (torch.zeros_like(parameter) if x is None else x for x in (a, b))
        assert torch.equal(parameter.grad, (a + b) / 2)
