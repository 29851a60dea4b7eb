"""Short texts first: how much of each text is trained on (v3.1, switch 4)."""

import torch
from torch import nn


WIDTH = 64  # tokens of a position bucket
DECAY = 0.9


class LengthCurriculum(nn.Module):
    """Lengths to which texts are cut, one after another, then whole texts.

    The next one comes when the NLL of the current length's last bucket, averaged over steps, is below a threshold, or the
    current one has had its share of the steps.

    Attributes:
        stage: how many lengths are behind. since: the step at which the current one began.
        nll: the average, infinite at first.
    """

    def __init__(self, lengths: list[int], threshold: float, share: float):
        super().__init__()
        self.lengths, self.threshold, self.share = lengths, threshold, share
        self.register_buffer("stage", torch.zeros((), dtype=torch.long))
        self.register_buffer("since", torch.zeros((), dtype=torch.long))
        self.register_buffer("nll", torch.full((), torch.inf, dtype=torch.float64))

    @property
    def length(self) -> int | None:
        """Of texts now; None: whole."""
        return self.lengths[self.stage] if self.stage < len(self.lengths) else None

    @property
    def bucket(self) -> slice:
        """Positions whose NLL decides; nothing once texts are whole."""
        return slice(0, 0) if self.length is None else slice(max(0, self.length - WIDTH), self.length)

    def update(self, nll: float, tokens: float, step: int, max_steps: int) -> None:
        """After step number `step`, from 1, whose bucket held so many tokens with an NLL of `nll` nats together."""
        if self.length is None:
            return
        if tokens:
            now = nll / tokens
            self.nll.fill_(now if self.nll.isinf() else DECAY * self.nll + (1 - DECAY) * now)
        if self.nll < self.threshold or step - self.since >= self.share * max_steps / len(self.lengths):
            self.stage += 1
            self.since.fill_(step)
            self.nll.fill_(torch.inf)
