"""Shared parts of the PPO, GRPO and SPO stages: reward, held-out metrics, token budget."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from unsloth_ext.common.hub import load_classifier, load_tokenizer

from ..common.config_checks import at_least
from ..common.rollout_diagnostics import RolloutDiagnostics
from ..tasks.reward import make_reward
from . import metrics
from .embedded import DELIMITER
from .stage import StageArguments, parse


@dataclass
class RLArguments(StageArguments):
    """Flags of the reinforcement learning stages."""

    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a reward model (one logit); the reward is its sigmoid. Without one, the "
            "reward is 1 for the right number after answer_delimiter, else 0."
        },
    )
    max_generated_tokens: int | None = field(
        default=None, metadata={"help": "Stop after this many generated tokens, to compare methods fairly."}
    )
    answer_delimiter: str = field(default=DELIMITER, metadata={"help": "Text before the number that is rewarded."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_generated_tokens=1)

    def reward(self) -> Callable[..., list[float]]:
        """The reward function; its values are from 0 to 1."""
        return RewardModel(self.reward_model) if self.reward_model else make_reward(self.answer_delimiter)


class TokenBudget(TrainerCallback):
    """End training when the rollouts of all processes reach a number of tokens; None: no limit.

    Tokens are counted from the logs.

    Attributes:
        generated: number of tokens so far, exact with `logging_steps=1`.
    """

    def __init__(self, most: int | None):
        self.most, self.generated = most, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.generated = sum(self._in(entry, args) for entry in state.log_history)  # of the run before it was resumed
        if self.most is not None and self.generated >= self.most:
            raise ValueError(f"no tokens left: {self.generated:,} were generated before; raise --max_generated_tokens")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.generated += self._in(logs, args)
        control.should_training_stop |= self.most is not None and self.generated >= self.most

    @staticmethod
    def _in(logs: dict[str, Any], args: Any) -> int:
        return round(logs.get("completions/mean_length", 0) * args.generation_batch_size)


class RewardModel:
    """Reward function: the sigmoid of a sequence classifier's single logit for the whole dialogue.

    Raises:
        ValueError: the classifier has more than one logit, or its tokenizer has no chat template.
    """

    __name__ = "reward_model"  # the name in the trainers' logs

    def __init__(self, name: str, batch_size: int = 16):
        self.model = load_classifier(name, "reward_model=", dtype="auto").eval()
        self.tokenizer, self.batch_size = load_tokenizer(name), batch_size
        if self.model.config.num_labels != 1:
            raise ValueError(f"reward_model={name}: has {self.model.config.num_labels} logits; a reward model has one")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"reward_model={name}: its tokenizer has no chat template")
        if torch.cuda.is_available():
            self.model.cuda()

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, **_) -> list[float]:
        texts = [
            self.tokenizer.apply_chat_template(prompt + completion, tokenize=False)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        found = []
        for first in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[first : first + self.batch_size], padding=True, add_special_tokens=False, return_tensors="pt"
            )
            found += self.model(**batch.to(self.model.device)).logits[:, 0].float().sigmoid().tolist()
        return found


def measures(
    stage: RLArguments, args: GRPOConfig, held_out: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Callable[[Trainer], float]]:
    """Held-out accuracy, or the mean reward if there is a reward model."""
    if stage.reward_model:
        return {"reward": lambda trainer: trainer.evaluate()["eval_reward"]}
    return {"accuracy": metrics.accuracy(held_out, tokenizer, stage.answer_delimiter, args.max_completion_length)}


def parse_rl(recipe: str, config: type[GRPOConfig]) -> tuple[RLArguments, GRPOConfig]:
    """`parse` for a reinforcement learning stage.

    Raises:
        ValueError: a reward model would score incomplete groups of completions.
    """
    stage, args = parse(recipe, RLArguments, config)
    group = args.num_generations_eval or args.num_generations
    batch = args.per_device_eval_batch_size * args.world_size
    if stage.reward_model and batch % group:  # TRL checks this only with an eval_strategy
        raise ValueError(
            f"per_device_eval_batch_size={args.per_device_eval_batch_size}: a reward model scores completions in "
            f"groups of num_generations={group}, but {batch} on {args.world_size} process(es) are not whole "
            "groups; use a multiple"
        )
    return stage, args


def diagnosed(trainer: GRPOTrainer) -> GRPOTrainer:
    """Add a callback that warns of signs of a failing run. TRL's own GRPOTrainer does not have it."""
    trainer.pop_callback(RolloutDiagnostics)
    trainer.add_callback(RolloutDiagnostics())
    return trainer
