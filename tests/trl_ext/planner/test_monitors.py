"""Each monitor against a loop that does what its name says."""

import math

import pytest
import torch

from trl_ext.planner.monitors import (
    GradientNorm,
    cosine_and_l2,
    delta_nll,
    entropy_and_max_prob,
    flip_rate,
    nll_by_bucket,
    random_like,
    shuffled,
    staleness_gap,
    top1_margin,
)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(found, wanted):
    assert found.dtype == torch.float64 and found.shape == () and not found.requires_grad
    assert abs(found.item() - wanted) <= 1e-12 * max(1, abs(wanted)), (found.item(), wanted)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def a_plan(rows=6, sizes=(5, 7, 3), quota=4):
    plan = torch.stack([torch.randint(size, (rows, quota)) for size in sizes], dim=1)
    lengths = torch.randint(quota + 1, (rows, len(sizes), 1))
    return plan.where(torch.arange(quota) < lengths, -1)


@pytest.mark.parametrize("function, sign", [(delta_nll, 1), (staleness_gap, -1)])
def test_differences(function, sign):
    a, b = rand(7), rand(7).requires_grad_()
    close(function(a, b), sign * mean((x - y).item() for x, y in zip(a, b)))
    close(function(a[:0], b[:0]), 0.0)


def test_low_precision_is_summed_in_fp32():
    ones = torch.full((1000,), 1.0, dtype=torch.bfloat16)
    found = delta_nll(ones, ones * 0)
    assert found.dtype == torch.float32 and found == 1


def test_top1_margin():
    scores = rand(6, 4)
    scores[1, 2:] = -torch.inf
    scores[2, 1:] = -torch.inf  # one candidate: no margin
    scores[3] = -torch.inf
    scores[4] = 0.5  # all alike
    margins = []
    for row in scores.tolist():
        there = sorted((x for x in row if x > -math.inf), reverse=True)
        if len(there) > 1:
            margins.append(there[0] - there[1])
    assert len(margins) == 4
    close(top1_margin(scores), mean(margins))
    close(top1_margin(torch.full((2, 3), -torch.inf, dtype=torch.float64)), 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        top1_margin(scores[:, :1])


def test_flip_rate():
    old = a_plan(8)
    new = old.clone()
    new[1, 0, 0] += 1
    new[4] = -1
    new[4, 2, 1] = 9
    new[6, 1, 3] = 8
    known = torch.tensor([True, True, False, True, False, True, True, True])
    for mask in (None, known, ~known, torch.zeros_like(known)):
        rows = [i for i in range(8) if mask is None or mask[i]]
        wanted = mean(float(old[i].tolist() != new[i].tolist()) for i in rows)
        found = flip_rate(old, new) if mask is None else flip_rate(old, new, mask)
        assert found.dtype == torch.float32 and found == torch.tensor(wanted, dtype=torch.float32)
    assert flip_rate(old, old) == 0 and flip_rate(old[:0], new[:0]) == 0


def test_entropy_and_max_prob():
    logits = rand(3, 5, 8)
    logits[0, 1, 2:] = -torch.inf
    logits[0, 2, 1:] = -torch.inf  # certain
    log_probs = logits.log_softmax(-1).requires_grad_()
    open_ = torch.rand(3, 5) < 0.6
    open_[0, 1:3] = True
    entropies, peaks = [], []
    for b in range(3):
        for j in range(5):
            if open_[b, j]:
                probs = [math.exp(x) for x in log_probs[b, j].tolist()]
                entropies.append(-sum(p * math.log(p) for p in probs if p))
                peaks.append(max(probs))
    entropy, peak = entropy_and_max_prob(log_probs, open_)
    close(entropy, mean(entropies))
    close(peak, mean(peaks))
    uniform = entropy_and_max_prob(torch.full((1, 2, 8), -math.log(8), dtype=torch.float64), torch.ones(1, 2).bool())
    close(uniform[0], math.log(8))
    close(uniform[1], 1 / 8)
    closed = log_probs.detach().where(open_[..., None], torch.nan)  # what is closed may be anything
    assert entropy_and_max_prob(closed, open_) == (entropy, peak)
    for found in entropy_and_max_prob(closed, torch.zeros_like(open_)):
        close(found, 0.0)


def test_cosine_and_l2():
    soft, hard, mask = rand(3, 2, 4, 6), rand(3, 2, 4, 6), torch.rand(3, 2, 4) < 0.6
    soft, hard = soft * mask[..., None], hard * mask[..., None]
    cosines, distances = [], []
    for b, i, j in mask.nonzero().tolist():
        x, y = soft[b, i, j].tolist(), hard[b, i, j].tolist()
        dot, xx, yy = (sum(p * q for p, q in zip(u, v)) for u, v in ((x, y), (x, x), (y, y)))
        cosines.append(dot / math.sqrt(xx * yy))
        distances.append(math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y))))
    cosine, distance = cosine_and_l2(soft.requires_grad_(), hard, mask)
    close(cosine, mean(cosines))
    close(distance, mean(distances))
    for found in cosine_and_l2(soft, hard, torch.zeros_like(mask)):
        close(found, 0.0)
    assert [x.item() for x in cosine_and_l2(hard, hard, mask)] == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize("length, width", [(10, 4), (8, 4), (3, 4), (1, 1), (130, 64)])
def test_nll_by_bucket(length, width):
    nll, mask = rand(3, length).abs(), torch.rand(3, length) < 0.7
    mask[:, length // 2 :] = False  # later buckets have no tokens
    mask[0, 0] = True
    nll = nll.masked_fill(~mask, torch.inf)
    wanted = {}
    for t in range(length):
        low = t // width * width
        for b in range(3):
            if mask[b, t]:
                wanted.setdefault(f"{low}-{low + width}", []).append(nll[b, t].item())
    found = nll_by_bucket(nll, mask, width)
    assert list(found) == list(wanted)
    for name, values in wanted.items():
        close(found[name], mean(values))
    assert nll_by_bucket(nll, mask.long(), width) == found  # as attention masks are
    assert nll_by_bucket(nll, torch.zeros_like(mask), width) == nll_by_bucket(nll[:, :0], mask[:, :0], width) == {}


def test_default_width():
    assert list(nll_by_bucket(rand(1, 70), torch.ones(1, 70).bool())) == ["0-64", "64-128"]


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_shuffled_is_a_derangement_of_rows(rows):
    plan = torch.arange(rows)[:, None, None].expand(rows, 2, 3).contiguous()
    seen = set()
    for seed in range(40):
        found = shuffled(plan, torch.Generator().manual_seed(seed))
        assert torch.equal(found, shuffled(plan, torch.Generator().manual_seed(seed)))
        sources = [row[0][0] for row in found.tolist()]
        assert sorted(sources) == list(range(rows)) and all(i != source for i, source in enumerate(sources))
        assert torch.equal(found, plan[sources])
        seen.add(tuple(sources))
    assert len(seen) == {2: 1, 3: 2}.get(rows, len(seen)) and (rows == 2 or len(seen) > 1)
    before = plan.clone()
    shuffled(plan)
    assert torch.equal(plan, before)


def test_shuffled_needs_another_row():
    with pytest.raises(ValueError, match="at least 2"):
        shuffled(a_plan(1))


def test_random_like():
    sizes = [5, 7, 3]
    plan = a_plan(2000, sizes)
    found = random_like(plan, sizes, torch.Generator().manual_seed(3))
    assert found.dtype == torch.long and torch.equal(found >= 0, plan >= 0) and (found[plan < 0] == -1).all()
    assert torch.equal(found, random_like(plan, sizes, torch.Generator().manual_seed(3)))
    for i, size in enumerate(sizes):
        ids = found[:, i][plan[:, i] >= 0]
        share = ids.bincount(minlength=size) / len(ids)
        assert len(share) == size and (share - 1 / size).abs().max() < 0.05
    empty = torch.full((2, 3, 4), -1)
    assert torch.equal(random_like(empty, sizes), empty)
    with pytest.raises(ValueError, match="3 types"):
        random_like(plan, [5])


def test_gradient_norm_is_autograds():
    weight, norm, square = rand(4, 3).requires_grad_(), GradientNorm(), 0.0
    for _ in range(3):  # micro-batches, each with a tensor of its own
        x, target = rand(5, 4), rand(5, 3)

        def forward(x=x, target=target):
            hidden = x @ weight
            return hidden, lambda: ((hidden.tanh() - target) ** 2).sum() + hidden.exp().mean()  # two ways meet in it

        hidden, loss = forward()
        (wanted,) = torch.autograd.grad(loss(), hidden)
        square += sum(g**2 for g in wanted.flatten().tolist())
        hidden, loss = forward()
        norm.watch(hidden)
        loss().backward()
    assert abs(norm.pop() - math.sqrt(square)) < 1e-12 * math.sqrt(square)
    assert norm.pop() is None


def test_gradient_norm_of_what_gets_none():
    norm = GradientNorm()
    x = rand(3).requires_grad_()
    norm.watch(x)
    assert norm.pop() == 0.0  # watched, and nothing came
    norm.watch(x.detach())
    assert norm.pop() == 0.0  # detached: the same thing
    with torch.no_grad():
        norm.watch(x * 2)
    assert norm.pop() is None  # evaluation says nothing about gradients


def test_gradient_norm_does_not_change_gradients_and_leaves_the_device_alone(monkeypatch):
    x = rand(3).to(torch.bfloat16).requires_grad_()
    (wanted,) = torch.autograd.grad((x * 3).sin().sum(), x)
    norm = GradientNorm()
    monkeypatch.setattr(torch.Tensor, "item", lambda _: pytest.fail("waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _: pytest.fail("waits for the device"))
    for _ in range(2):
        norm.watch(x)
        (found,) = torch.autograd.grad((x * 3).sin().sum(), x)
        assert torch.equal(found, wanted)
        x = x.detach().clone().requires_grad_()
    monkeypatch.undo()
    assert norm.pop() == pytest.approx(math.sqrt(2) * wanted.float().norm().item(), rel=1e-6)
