"""A callback that warns about reinforcement runs that cannot learn although no error occurs."""

from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)
WINDOW = 10  # consecutive logs
MOST_LOG_RATIO = 10.0  # of a soft token: a ratio of 22,000, far outside any clipping range


class RolloutDiagnostics(TrainerCallback):
    """Warn when the logs of a `GRPOTrainer`, or of one of ours, show that nothing can be learnt.

    It looks at ten logs in a row, or at all logs of a shorter run, and gives each warning once. A resumed run continues
    with the logs before it.

    Args:
        delimiter: the text that ends the thinking, if the method has one.
    """

    def __init__(self, delimiter: str | None = None):
        self.delimiter = delimiter
        self._forget()

    def _forget(self) -> None:
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._thinking: list[float] = []  # shares of thinking tokens in the first logs
        self._said: set[str] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._forget()
        for logs in state.log_history:
            self._remember(logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if 1 < len(self._recent) < WINDOW and state.is_world_process_zero:
            self._warn(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._remember(logs or {}) and len(self._recent) == WINDOW and state.is_world_process_zero:
            self._warn(state.global_step)

    def _remember(self, logs: dict[str, float]) -> bool:
        """Keep the logs of a rollout. Returns whether they belong to one."""
        if "reward" not in logs:
            return False
        self._recent.append(logs)
        if len(self._thinking) < WINDOW and "thinking/fraction" in logs:
            self._thinking.append(logs["thinking/fraction"])
        return True

    def _warn(self, step: int) -> None:
        for name, sentence in self._signs().items():
            if name not in self._said:
                self._said.add(name)
                logger.warning(f"step {step}: {sentence}")

    def _signs(self) -> dict[str, str]:
        found, count = {}, len(self._recent)
        rewards = self._series("reward")
        if all(share == 1 for share in self._series("frac_reward_zero_std")):
            found["variance"] = (
                f"in the last {count} logs all completions of a prompt had the same reward (mean {_mean(rewards):.3g}): "
                "all advantages were 0 and nothing was learnt; make the task easier or harder, raise "
                "num_generations or temperature, or check reward_funcs on a few completions (log_completions=True)"
            )
        elif min(rewards) == max(rewards):
            found["reward"] = (
                f"the reward was {rewards[0]:.3g} in each of the last {count} logs; check reward_funcs on a few "
                "completions (log_completions=True)"
            )
        if not any(self._series("completions/delimiter_rate", 1.0)):
            found["delimiter"] = (
                f"no completion of the last {count} logs has the delimiter {self.delimiter!r}, so every token is thinking "
                "and the reward for the answer after it is 0; ask for it in the prompt, show examples, raise "
                "max_completion_length, or set answer_delimiter to what the model writes"
            )
        first, now = _mean(self._thinking), _mean(self._series("thinking/fraction"))
        if len(self._thinking) == WINDOW and now < 0.1 * first:
            found["thinking"] = (
                f"the share of thinking tokens fell from {first:.1%} to {now:.1%}: the model writes the delimiter at once; "
                "reward the reasoning too, lower the learning rate, or set beta above 0"
            )
        ratios = self._series("thinking/log_ratio")
        if min(ratios) > MOST_LOG_RATIO:
            found["log_ratio"] = (
                f"the largest log-ratio of a soft token was {_mean(ratios):.3g} on average over the last {count} logs, so "
                "its importance ratio is clipped or overflows; lower learning_rate or num_iterations, or set "
                "noise_likelihood='mean'"
            )
        return found

    def _series(self, name: str, missing: float = 0.0) -> list[float]:
        return [missing if (value := logs.get(name)) is None else value for logs in self._recent]


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)
