"""Sampling of prompts: those with the least certain outcome are drawn more often."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class PrioritizedSampler(Sampler[int]):
    """Draw rows for one rollout after the other, weighted by sqrt(v (1 - v)) + epsilon (arXiv 2509.13232, section 3.3).

    Rows are drawn without replacement within a rollout. An iteration has as many rollouts as with a shuffled dataset.
    The loader asks for rows in advance, so a draw does not know the rewards of the previous rollout. A resumed run
    repeats the draws of its epoch from `draws`, and continues with the saved generator.

    Args:
        values: returns every row's expected reward in [0, 1], (rows,).
        rows: number of rows in the dataset.
        batch_size: prompts per rollout, over all processes.
        repeat_count: how often the loop asks for the same rollout.
        seed: the same on every process.
        epsilon: weight of a row whose outcome is certain.

    Attributes:
        draws: (rollouts, batch_size) long; the draws of this epoch.
        generator: of the draws.
    """

    def __init__(
        self,
        values: Callable[[], torch.Tensor],
        rows: int,
        batch_size: int,
        repeat_count: int,
        seed: int,
        epsilon: float = 0.05,
    ):
        self.values, self.rows, self.batch_size, self.repeat_count = values, rows, batch_size, repeat_count
        self.epsilon = epsilon
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = torch.empty(0, batch_size, dtype=torch.long)
        self._repeated = 0  # number of draws that the next iteration repeats

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.batch_size * self.repeat_count

    def __iter__(self) -> Iterator[int]:
        self.draws, self._repeated = self.draws[: self._repeated], 0
        for rollout in range(self.rows // self.batch_size):
            if rollout == len(self.draws):
                self.draws = torch.cat([self.draws, self._draw()[None]])
            for _ in range(self.repeat_count):
                yield from self.draws[rollout].tolist()

    def _draw(self) -> torch.Tensor:
        v = self.values().cpu()
        weights = (v * (1 - v)).sqrt() + self.epsilon
        return torch.multinomial(weights, self.batch_size, generator=self.generator)

    def state_dict(self, over: bool = False) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint. `over` says that the epoch has ended, so its draws are not needed again."""
        return {"draws": self.draws[:0] if over else self.draws, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load a checkpoint. The next iteration repeats the draws of its epoch, then continues."""
        self.draws, self._repeated = state["draws"], len(state["draws"])
        self.generator.set_state(state["generator"])
