"""Length curriculum: texts are cut short at first, then whole (v3.1, switch 4)."""

import torch
from torch import nn


WIDTH = 64  # tokens of a position bucket
DECAY = 0.9


class LengthCurriculum(nn.Module):
    """Lengths to which texts are cut, one after another; then texts are whole.

    The next length is used when the NLL of the last bucket of the current length, averaged over steps, is below a
    threshold, or when the current length has had its share of the steps.

    Args:
        lengths: increasing lengths in tokens.
        threshold: NLL in nats per token.
        share: share of all steps after which texts are whole.

    Attributes:
        stage: index of the current length, a scalar long.
        since: step at which the current length began, a scalar long.
        nll: moving average of the NLL, a scalar float64; infinite at first.
    """

    def __init__(self, lengths: list[int], threshold: float, share: float):
        super().__init__()
        self.lengths, self.threshold, self.share = lengths, threshold, share
        self.register_buffer("stage", torch.zeros((), dtype=torch.long))
        self.register_buffer("since", torch.zeros((), dtype=torch.long))
        self.register_buffer("nll", torch.full((), torch.inf, dtype=torch.float64))

    @property
    def length(self) -> int | None:
        """The current maximum length; None: texts are whole."""
        return self.lengths[self.stage] if self.stage < len(self.lengths) else None

    @property
    def bucket(self) -> slice:
        """The positions whose NLL is averaged; empty once texts are whole."""
        return slice(0, 0) if self.length is None else slice(max(0, self.length - WIDTH), self.length)

    def update(self, nll: float, tokens: float, step: int, max_steps: int) -> None:
        """Update after a step.

        Args:
            nll: sum of the NLL in the bucket, in nats.
            tokens: number of tokens in the bucket.
            step: number of the step, from 1.
            max_steps: number of all steps.
        """
        if self.length is None:
            return
        if tokens:
            now = nll / tokens
            self.nll.fill_(now if self.nll.isinf() else DECAY * self.nll + (1 - DECAY) * now)
        if self.nll < self.threshold or step - self.since >= self.share * max_steps / len(self.lengths):
            self.stage += 1
            self.since.fill_(step)
            self.nll.fill_(torch.inf)
