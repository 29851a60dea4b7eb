"""Metrics of the stages on held-out rows."""

import math
from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.data_utils import apply_chat_template

from unsloth_ext.common.evaluation_mode import evaluating

from ..tasks.evaluation import evaluate
from .data import load_minimind_data
from .embedded import DELIMITER
from .stage import EMBEDDED, StageArguments


def loss(trainer: Trainer) -> float:
    """Mean loss in nats per trained token: all tokens, or the assistant's if only they are trained."""
    return trainer.evaluate()["eval_loss"]


def part(name: str) -> Callable[[Trainer], float]:
    """A term that a distillation logs beside its loss, in nats per token."""
    return lambda trainer: trainer.evaluate()[f"eval_loss/{name}"]


def perplexity(trainer: Trainer) -> float:
    """exp(loss in nats per token)."""
    return math.exp(loss(trainer))


def accuracy(rows: Dataset, tokenizer: PreTrainedTokenizerBase, delimiter: str, max_new_tokens: int) -> Callable:
    """Share of prompts whose greedy answer has the number of `answer` after the delimiter."""

    def measure(trainer: Trainer) -> float:
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = evaluate(
            model, tokenizer, rows, delimiter=delimiter, max_new_tokens=max_new_tokens, batch_size=250, thinking="off"
        )
        return found.accuracy

    return measure


def sums(
    stage: StageArguments, tokenizer: PreTrainedTokenizerBase, delimiter: str = DELIMITER, max_new_tokens: int = 40
) -> dict[str, Callable]:
    """Accuracy on the built-in held-out sums; empty for other datasets."""
    if stage.dataset != EMBEDDED:
        return {}
    rows = load_minimind_data(stage.file("rl_eval"), "rl")
    return {"accuracy on sums": accuracy(rows, tokenizer, delimiter, max_new_tokens)}


def ranking_accuracy(rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64) -> Callable:
    """Share of pairs in which the chosen answer has the higher log-probability, summed over tokens."""

    def measure(trainer: Trainer) -> float:
        model = trainer.accelerator.unwrap_model(trainer.model)
        chosen, rejected = (
            answer_log_probs(model, tokenizer, rows["prompt"], rows[side], batch_size)
            for side in ("chosen", "rejected")
        )
        return (chosen > rejected).double().mean().item()

    return measure


@torch.no_grad()
def answer_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list, answers: list, batch_size: int
) -> torch.Tensor:
    """log p(answer | prompt) of messages, including the token that ends the answer's turn.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, with a chat template.
        prompts, answers: messages of each row.
        batch_size: rows per batch.

    Returns:
        (rows,) float32, in nats, on the CPU.
    """
    found = []
    with evaluating(model):
        for first in range(0, len(prompts), batch_size):
            pairs = zip(prompts[first : first + batch_size], answers[first : first + batch_size], strict=True)
            texts = [apply_chat_template({"prompt": p, "completion": a}, tokenizer) for p, a in pairs]
            starts = [len(tokenizer(text["prompt"], add_special_tokens=False)["input_ids"]) for text in texts]
            batch = tokenizer(
                [text["prompt"] + _turn(text["completion"], tokenizer.eos_token) for text in texts],
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            ).to(model.device)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            targets = batch["input_ids"][:, 1:]
            log_probs = logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
            place = torch.arange(1, targets.shape[1] + 1, device=targets.device)
            answered = (place >= torch.tensor(starts, device=targets.device)[:, None]) & batch["attention_mask"][
                :, 1:
            ].bool()
            found.append((log_probs * answered).sum(1).cpu())
    return torch.cat(found)


def _turn(completion: str, end: str) -> str:
    """A completion without the newline that the template appends after the end token."""
    said, ended, _ = completion.rpartition(end)
    return said + ended if ended else completion
