"""What PPO, GRPO and SPO share: where the reward comes from, and what is held out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, Trainer
from trl import GRPOConfig

from ..tasks.reward import make_reward
from . import metrics
from .embedded import DELIMITER
from .stage import StageArguments


@dataclass
class RLArguments(StageArguments):
    """Flags of the reinforcement stages."""

    reward_model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a reward model (one logit), whose sigmoid is the reward; without one, 1 for "
                  "the number of the reference behind answer_delimiter, else 0."},
    )  # fmt: skip
    answer_delimiter: str = field(default=DELIMITER, metadata={"help": "Text before the number that is rewarded."})

    def reward(self) -> Callable[..., list[float]]:
        """From 0 to 1 for each completion."""
        return RewardModel(self.reward_model) if self.reward_model else make_reward(self.answer_delimiter)


class RewardModel:
    """sigmoid of a sequence classifier's one logit for the whole dialogue.

    Raises:
        ValueError: the classifier has more than one logit, or its tokenizer no chat template.
    """

    __name__ = "reward_model"  # as trainers call it in their logs

    def __init__(self, name: str, batch_size: int = 16):
        self.model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto").eval()
        self.tokenizer, self.batch_size = AutoTokenizer.from_pretrained(name), batch_size
        if self.model.config.num_labels != 1:
            raise ValueError(f"reward_model={name}: {self.model.config.num_labels} logits; a reward model has one")
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
    """Held-out accuracy, or with a reward model the mean reward."""
    if stage.reward_model:
        return {"reward": lambda trainer: trainer.evaluate()["eval_reward"]}
    return {"accuracy": metrics.accuracy(held_out, tokenizer, stage.answer_delimiter, args.max_completion_length)}
