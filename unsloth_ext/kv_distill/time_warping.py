"""Resampling in time, segment by segment: prompt, reasoning and answer each at a rate of its own."""

from dataclasses import dataclass, field

import torch


SEGMENTS = ("P", "R", "A")  # ids 0, 1, 2: prompt, reasoning, answer; negative ids are padding


@dataclass(frozen=True)
class WarpPlan:
    """Where each of T_s output times of each row comes from.

    Attributes:
        left, right (B, T_s) long: the two input times that are interpolated. weight (B, T_s): of `right`.
        first, last (B, T_s) long: the input times of the output's own part of the segment, in `order`; what is averaged.
        smooth (B, T_s): weight of that average.
        order (B, T) long: input times by segment. valid (B, T_s) bool. segment_ids (B, T_s) long, -1 where not valid.
    """

    left: torch.Tensor
    right: torch.Tensor
    weight: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    smooth: torch.Tensor
    order: torch.Tensor
    valid: torch.Tensor
    segment_ids: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H, T, D) to (B, L, H, T_s, D); zero where not valid."""

        def at(source: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            where = times[:, None, None, :, None]
            return source.gather(3, where.expand(-1, *source.shape[1:3], -1, source.shape[-1]))

        def over(values: torch.Tensor) -> torch.Tensor:
            return values[:, None, None, :, None].to(x.dtype)

        out = torch.lerp(at(x, self.left), at(x, self.right), over(self.weight))
        if self.smooth.any():
            sums = at(x, self.order).float().cumsum(3)
            sums = torch.nn.functional.pad(sums, (0, 0, 1, 0))
            mean = (at(sums, self.last + 1) - at(sums, self.first)) / over(self.last - self.first + 1)
            out = torch.lerp(out, mean.to(x.dtype), over(self.smooth))
        return out * over(self.valid)


@dataclass(frozen=True)
class SegmentTimeWarper:
    """Resamples each row's segments by linear interpolation from end to end.

    Attributes:
        ratio_map: sampling rate of P, R and A: how many output times a token gets, before T_s scales all of them alike.
            0 leaves a segment out.
        alpha_map: smoothing of P, R and A between 0, samples, and 1, means over each output time's part of the segment.

    Raises:
        ValueError: a segment is unknown, or a rate or smoothing out of range.
    """

    ratio_map: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEGMENTS, 1.0))
    alpha_map: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEGMENTS, 0.0))

    def __post_init__(self) -> None:
        for name, most in (("ratio_map", float("inf")), ("alpha_map", 1.0)):
            found = getattr(self, name)
            if set(found) != set(SEGMENTS):
                raise ValueError(f"{name}={found}: one number for each of {', '.join(SEGMENTS)}")
            for segment, value in found.items():
                if not 0 <= value <= most or value == float("inf"):
                    raise ValueError(f"{name}[{segment!r}]={value}: between 0 and {most:g}")
        if not any(self.ratio_map.values()):
            raise ValueError("ratio_map: all rates are 0, nothing would be left")

    def __call__(self, x: torch.Tensor, segment_ids: torch.Tensor, T_s: int | None = None) -> torch.Tensor:
        """(B, L, H, T, D) to (B, L, H, T_s, D). `plan` has the validity mask, which matters where rows are ragged."""
        return self.plan(segment_ids, T_s).apply(x)

    def plan(
        self, segment_ids: torch.Tensor, T_s: int | None = None, target_ids: torch.Tensor | None = None
    ) -> WarpPlan:
        """Which input times make which output times.

        Args:
            segment_ids (B, T) long: 0, 1, 2 for P, R, A; negative for padding. Each row has its own.
            T_s: output times of every row; segments that are not empty get one or more. None: what the rates give, which
                differs by row.
            target_ids (B, T') long: segments of another text, whose lengths are taken in place of rates.

        Raises:
            ValueError: T_s is too small for the segments of a row, or a row of the target has a segment that is empty
                here.
        """
        if segment_ids.dim() != 2 or segment_ids.is_floating_point() or segment_ids.max() >= len(SEGMENTS):
            raise ValueError(
                f"segment_ids {tuple(segment_ids.shape)}: whole numbers (B, T), at most {len(SEGMENTS) - 1}"
            )
        lengths = _lengths(segment_ids)
        if target_ids is not None:
            counts = _lengths(target_ids)
            lost = ((counts > 0) & (lengths == 0)).nonzero().tolist()
            if lost:
                row, segment = lost[0]
                raise ValueError(f"row {row} has no segment {SEGMENTS[segment]} to take the target's from")
        else:
            counts = self._counts(lengths, T_s)
        return self._plan(segment_ids, lengths, counts)

    def _counts(self, lengths: torch.Tensor, T_s: int | None) -> torch.Tensor:
        """Output times (B, 3) of each segment."""
        rates = torch.tensor([self.ratio_map[s] for s in SEGMENTS], device=lengths.device, dtype=torch.float64)
        share = lengths * rates
        used = (share > 0).long()
        if T_s is None:
            return share.round().long().clamp(min=used)
        most = int(used.sum(1).max())
        if T_s < most:
            raise ValueError(f"T_s={T_s}: a row has {most} segments, which need one output time each")
        share = share * T_s / share.sum(1, keepdim=True).clamp(min=1e-9)
        counts = share.floor().long().clamp(min=used)
        # By largest remainder; what segments of one output time took too much, the longest gives back
        left = T_s - counts.sum(1, keepdim=True)
        rank = (share - counts).masked_fill(used == 0, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
        counts = counts + (rank < left).long() * used
        counts = counts.scatter_add(1, counts.argmax(1, keepdim=True), left.clamp(max=0))
        return counts * (used.sum(1, keepdim=True) > 0)

    def _plan(self, segment_ids: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> WarpPlan:
        last_id = len(SEGMENTS)
        order = segment_ids.masked_fill(segment_ids < 0, last_id).argsort(dim=1, stable=True)
        ends = counts.cumsum(1)
        times = (
            torch.arange(int(ends[:, -1].max()), device=segment_ids.device).expand(len(segment_ids), -1).contiguous()
        )
        valid = times < ends[:, -1:]
        segment = torch.searchsorted(ends, times, right=True).clamp(max=last_id - 1)
        of = {
            name: table.gather(1, segment)
            for name, table in {
                "count": counts,
                "length": lengths,
                "from": lengths.cumsum(1) - lengths,
                "to": ends - counts,
            }.items()
        }
        index, count, length = times - of["to"], of["count"].clamp(min=1), of["length"].clamp(min=1)
        # From the first token to the last one; a single output time is in the middle
        place = torch.where(count > 1, index * (length - 1) / (count - 1).clamp(min=1), (length - 1) / 2)
        place = place.minimum(length - 1).double()
        left = place.floor().long()
        first = index * length // count
        last = ((index + 1) * length + count - 1) // count - 1
        smooth = torch.tensor([self.alpha_map[s] for s in SEGMENTS], device=segment_ids.device)[segment]

        def column(inside: torch.Tensor) -> torch.Tensor:
            return (of["from"] + inside.minimum(length - 1)).clamp(max=segment_ids.shape[1] - 1)

        return WarpPlan(
            left=order.gather(1, column(left)),
            right=order.gather(1, column(left + 1)),
            weight=(place - left).float(),
            first=column(first),
            last=column(last),
            smooth=smooth * valid,
            order=order,
            valid=valid,
            segment_ids=segment.masked_fill(~valid, -1),
        )


def create_reasoning_focused_warper() -> SegmentTimeWarper:
    """Prompt and answer token by token, the reasoning at half the rate, each output time there half a mean."""
    return SegmentTimeWarper({"P": 1.0, "R": 0.5, "A": 1.0}, {"P": 0.0, "R": 0.5, "A": 0.0})


def _lengths(segment_ids: torch.Tensor) -> torch.Tensor:
    """(B, 3) tokens of each segment."""
    return torch.stack([(segment_ids == i).sum(1) for i in range(len(SEGMENTS))], dim=1)
