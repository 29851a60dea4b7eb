"""Segment-wise resampling against a plain loop over rows, segments and times."""

import pytest
import torch

from unsloth_ext import SegmentTimeWarper, create_reasoning_focused_warper


ROWS = {
    "whole": [0] * 10 + [1] * 20 + [2] * 5 + [-1] * 5,
    "two segments": [0] * 3 + [1] * 1 + [-1] * 36,
    "long": [0] * 5 + [1] * 30 + [2] * 5,
    "left pads": [-1] * 20 + [0] * 4 + [1] * 9 + [2] * 7,
    "only reasoning": [1] * 40,
    "interleaved": [0, 1] * 15 + [2] * 10,
}
IDS = torch.tensor(list(ROWS.values()))
WARPERS = {
    "plain": SegmentTimeWarper(),
    "reasoning": create_reasoning_focused_warper(),
    "smooth": SegmentTimeWarper({"P": 0.5, "R": 2.0, "A": 1.0}, {"P": 1.0, "R": 0.3, "A": 0.7}),
}


def plain(warper, x, ids, counts):
    """One row (L, H, T, D) by loops."""
    out = []
    for segment, count in enumerate(counts):
        times = [t for t, s in enumerate(ids) if s == segment]
        n = len(times)
        for i in range(count):
            place = i * (n - 1) / (count - 1) if count > 1 else (n - 1) / 2
            low = int(place)
            high = min(low + 1, n - 1)
            line = x[:, :, times[low]] * (1 - (place - low)) + x[:, :, times[high]] * (place - low)
            first, last = i * n // count, -(-(i + 1) * n // count)
            mean = torch.stack([x[:, :, t] for t in times[first:last]]).mean(0)
            alpha = warper.alpha_map["PRA"[segment]]
            out.append((1 - alpha) * line + alpha * mean)
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("length", [None, 3, 7, 50, 90])
@pytest.mark.parametrize("name", WARPERS)
def test_each_row_is_the_plain_loop(name, length):
    """1e-5. Shorter and longer than the input, empty segments, segments of one token, pads on both sides."""
    warper = WARPERS[name]
    x = torch.randn(len(IDS), 2, 3, 40, 4, generator=torch.Generator().manual_seed(0))
    plan = warper.plan(IDS, length)
    out = warper(x, IDS, T_s=length)
    for row, ids in enumerate(IDS.tolist()):
        counts = [int((plan.segment_ids[row] == s).sum()) for s in range(3)]
        wanted = plain(warper, x[row], ids, counts)
        total = sum(counts)
        assert plan.valid[row].tolist() == [True] * total + [False] * (out.shape[3] - total)
        torch.testing.assert_close(out[row, :, :, :total], wanted, atol=1e-5, rtol=1e-5)
        assert not out[row, :, :, total:].any()
        if length is not None:
            assert total == length and all((c > 0) == (s in ids) for s, c in enumerate(counts))


def test_counts_follow_rates():
    """Of 10, 20 and 5 tokens at 1, 1/2, 1: as many of P as of R; what is asked for is given out to the last one."""
    ids = IDS[:1]
    warper = create_reasoning_focused_warper()
    for length, wanted in ((None, [10, 10, 5]), (50, [20, 20, 10]), (3, [1, 1, 1]), (7, [3, 3, 1])):
        found = warper.plan(ids, length).segment_ids[0]
        assert [int((found == s).sum()) for s in range(3)] == wanted


@pytest.mark.parametrize("length", [3, 4, 5, 11, 29, 64])
def test_counts_are_within_one_of_their_share(length):
    torch.manual_seed(0)
    lengths = torch.randint(0, 30, (200, 3))
    lengths[lengths.sum(1) == 0, 0] = 1
    ids = torch.full((200, 90), -1)
    for row, (p, r, a) in enumerate(lengths.tolist()):
        ids[row, : p + r + a] = torch.tensor([0] * p + [1] * r + [2] * a)
    found = WARPERS["smooth"].plan(ids, length).segment_ids
    counts = torch.stack([(found == s).sum(1) for s in range(3)], dim=1)
    assert (counts.sum(1) == length).all() and ((counts > 0) == (lengths > 0)).all()
    share = lengths * torch.tensor([0.5, 2.0, 1.0])
    share = share / share.sum(1, keepdim=True) * length
    assert ((counts - share).abs() < 1 + (share < 1).sum(1, keepdim=True)).all()  # those below one got a whole one


@pytest.mark.parametrize("name", ["plain", "smooth"])
def test_rate_one_is_the_identity(name):
    """1e-6 of the largest number, for samples and for means; pads become zero."""
    warper = SegmentTimeWarper(alpha_map=WARPERS[name].alpha_map)
    ids = IDS[[0, 2, 4]]
    x = torch.randn(3, 2, 2, 40, 4)
    real = (ids >= 0)[:, None, None, :, None]
    assert (warper(x, ids) - x * real).abs().max() <= 1e-6 * x.abs().max()


def test_equal_rows_are_each_the_single_row_and_others_do_not_matter():
    """Exactly."""
    warper = WARPERS["smooth"]
    x = torch.randn(3, 2, 2, 40, 4)
    same = IDS[:1].expand(3, -1)
    together = warper(x, same, T_s=50)
    for row in range(3):
        assert torch.equal(together[row], warper(x[row : row + 1], IDS[:1], T_s=50)[0])
    mixed = warper(x, IDS[[0, 1, 3]], T_s=50)
    assert torch.equal(mixed[0], together[0])


def test_pad_values_never_matter_and_gradients_reach_every_token():
    warper = create_reasoning_focused_warper()
    x = torch.randn(1, 1, 1, 40, 2, requires_grad=True)
    warper(x, IDS[:1]).sum().backward()
    touched = x.grad.abs().sum(-1).flatten() > 0
    assert touched.tolist() == [s >= 0 for s in ROWS["whole"]]


@pytest.mark.parametrize("length", [None, 7])
def test_a_row_of_pads_has_no_times_and_leaves_the_others_alone(length):
    """Exactly."""
    warper, x = WARPERS["smooth"], torch.randn(2, 2, 2, 40, 4)
    ids = torch.stack([IDS[0], torch.full((40,), -1)])
    plan = warper.plan(ids, length)
    assert not plan.valid[1].any() and (plan.segment_ids[1] == -1).all()
    out = plan.apply(x)
    assert torch.equal(out[0], warper(x[:1], IDS[:1], T_s=length)[0]) and not out[1].any()


def test_another_text_is_resampled_to_the_targets_segments():
    """Reasoning of 20 tokens to 8, prompt and answer token by token."""
    source = torch.tensor([[0] * 4 + [1] * 20 + [2] * 3])
    target = torch.tensor([[0] * 4 + [1] * 8 + [2] * 3 + [-1] * 2])
    x = torch.randn(1, 1, 1, 27, 2)
    plan = SegmentTimeWarper().plan(source, target_ids=target)
    out = plan.apply(x)
    assert plan.segment_ids.tolist() == [[0] * 4 + [1] * 8 + [2] * 3]
    assert torch.equal(out[..., :4, :], x[..., :4, :]) and torch.equal(out[..., 12:, :], x[..., 24:, :])
    assert torch.equal(out[..., 4, :], x[..., 4, :]) and torch.equal(out[..., 11, :], x[..., 23, :])
    with pytest.raises(ValueError, match="row 0 has no segment A"):
        SegmentTimeWarper().plan(torch.tensor([[0, 1]]), target_ids=target)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="T_s=2: a row has 3 segments"):
        SegmentTimeWarper().plan(IDS, 2)
    with pytest.raises(ValueError, match=r"ratio_map.*one number for each"):
        SegmentTimeWarper({"P": 1.0})
    with pytest.raises(ValueError, match=r"alpha_map\['R'\]=2"):
        SegmentTimeWarper(alpha_map={"P": 0.0, "R": 2.0, "A": 0.0})
    with pytest.raises(ValueError, match="all rates are 0"):
        SegmentTimeWarper(dict.fromkeys("PRA", 0.0))
    with pytest.raises(ValueError, match="segment_ids"):
        SegmentTimeWarper().plan(torch.tensor([[0, 3]]))
