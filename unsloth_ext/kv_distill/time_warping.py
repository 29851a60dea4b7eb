"""Resampling in time, with a separate rate for prompt, reasoning and answer (ours)."""

from dataclasses import dataclass, field

import torch


SEGMENTS = ("P", "R", "A")  # ids 0, 1, 2: prompt, reasoning, answer; negative ids are padding


@dataclass(frozen=True)
class WarpPlan:
    """The source of each of the T_s output times of each row.

    Attributes:
        left, right (B, T_s): long, the two input times that are interpolated.
        weight (B, T_s): fp32, the weight of `right`.
        first, last (B, T_s): long, the range that is averaged: input times, in `order`, of the output's part of the
            segment.
        smooth (B, T_s): fp32, the weight of that average.
        order (B, T): long, the input times sorted by segment.
        valid (B, T_s): bool.
        segment_ids (B, T_s): long, -1 where not valid.
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
        """Resample (B, L, H, T, D) to (B, L, H, T_s, D), with zeros where not valid."""

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
    """Resample the segments of each row by linear interpolation from end to end.

    Attributes:
        ratio_map: the sampling rate of P, R and A: the output times for each token, before T_s scales all of them
            alike. 0 leaves a segment out.
        alpha_map: the smoothing of P, R and A: from 0, which samples, to 1, which averages over each output time's part
            of the segment.

    Raises:
        ValueError: a segment is unknown, or a rate or smoothing is out of range.
    """

    ratio_map: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEGMENTS, 1.0))
    alpha_map: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEGMENTS, 0.0))

    def __post_init__(self) -> None:
        for name, most in (("ratio_map", float("inf")), ("alpha_map", 1.0)):
            found = getattr(self, name)
            if set(found) != set(SEGMENTS):
                raise ValueError(f"{name}={found}: must have one number for each of {', '.join(SEGMENTS)}")
            for segment, value in found.items():
                if not 0 <= value <= most or value == float("inf"):
                    raise ValueError(f"{name}[{segment!r}]={value}: must be between 0 and {most:g}")
        if not any(self.ratio_map.values()):
            raise ValueError("ratio_map: all rates are 0, so nothing would be left")

    def __call__(self, x: torch.Tensor, segment_ids: torch.Tensor, T_s: int | None = None) -> torch.Tensor:
        """Resample (B, L, H, T, D) to (B, L, H, T_s, D). Rows may differ in length: `plan` has the validity mask."""
        return self.plan(segment_ids, T_s).apply(x)

    def plan(
        self, segment_ids: torch.Tensor, T_s: int | None = None, target_ids: torch.Tensor | None = None
    ) -> WarpPlan:
        """Compute the input times of each output time.

        Args:
            segment_ids (B, T): long, 0, 1, 2 for P, R, A, negative for padding. Each row has its own.
            T_s: the number of output times of every row. A segment that is not empty gets at least one. None means as
                many as the rates give, which differs by row.
            target_ids (B, T'): long, the segments of another text, whose lengths are used instead of rates.

        Returns:
            The plan.

        Raises:
            ValueError: `segment_ids` have another shape, dtype or range; T_s is too small for the segments of a row; or
                a row of the target has a segment that is empty here.
        """
        if segment_ids.dim() != 2 or segment_ids.is_floating_point() or segment_ids.max() >= len(SEGMENTS):
            raise ValueError(
                f"segment_ids {tuple(segment_ids.shape)}: must be whole numbers (B, T), at most {len(SEGMENTS) - 1}"
            )
        lengths = _lengths(segment_ids)
        if target_ids is not None:
            counts = _lengths(target_ids)
            lost = ((counts > 0) & (lengths == 0)).nonzero().tolist()
            if lost:
                row, segment = lost[0]
                raise ValueError(f"row {row} has no segment {SEGMENTS[segment]} for that of the target")
        else:
            counts = self._counts(lengths, T_s)
        return self._plan(segment_ids, lengths, counts)

    def _counts(self, lengths: torch.Tensor, T_s: int | None) -> torch.Tensor:
        """Return the number of output times (B, 3) of each segment."""
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
        # Round by largest remainder. If segments raised to one output time exceed the total, the longest segment is cut
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
        # From the first token to the last; a single output time is in the middle
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
    """Make a warper that keeps prompt and answer token by token and samples the reasoning at half the rate, half
    smoothed.
    """
    return SegmentTimeWarper({"P": 1.0, "R": 0.5, "A": 1.0}, {"P": 0.0, "R": 0.5, "A": 0.0})


def _lengths(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens (B, 3) of each segment."""
    return torch.stack([(segment_ids == i).sum(1) for i in range(len(SEGMENTS))], dim=1)
