"""Views of latent tokens: the tokens that the LM head decodes from them, and a picture of their keys and values."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.latent.model import question_batch
from unsloth_ext.latent.phase import latent_phase
from unsloth_ext.latent.probe import KVSimilarity, probe_latents

from ..cli.report import pyplot_for_files


RESULT = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)\s*(?:>>)?\s*$")


@dataclass
class Probe:
    """Tokens that the LM head decodes from the latent tokens of n questions.

    Attributes:
        tokens: the most likely tokens of each question and slot.
        found: share of the step results of a question whose first token is among the most likely tokens of some slot.
        by_chance: the same for the results of another question. Both are None if no step ends in `= number`.
    """

    tokens: list[list[list[str]]]
    found: float | None
    by_chance: float | None


@torch.no_grad()
def probe(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    k: int = 3,
    batch_size: int = 64,
) -> Probe:
    """Decode the latent tokens of each row's question.

    Args:
        model: a causal LM with latent tokens.
        tokenizer: its tokenizer.
        rows: dicts with `question` and `steps`.
        k: number of tokens per slot.
        batch_size: questions per batch.
    """
    tops = []
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = question_batch(tokenizer, [row["question"] for row in rows[start : start + batch_size]])
            state = latent_phase(model, *(batch[key].to(model.device) for key in ("input_ids", "attention_mask")))
            tops += probe_latents(model, state, k)[0].tolist()
    seen = [{token for slot in slots for token in slot} for slots in tops]
    results = [[first_token(tokenizer, found[1]) for s in row["steps"] if (found := RESULT.search(s))] for row in rows]
    return Probe(
        [[[tokenizer.decode([token]) for token in slot] for slot in slots] for slots in tops],
        _share(results, seen),
        _share(results, seen[1:] + seen[:1]),
    )


def first_token(tokenizer: PreTrainedTokenizerBase, number: str) -> int:
    """The first token of a number."""
    return tokenizer(number, add_special_tokens=False)["input_ids"][0]


def _share(results: list[list[int]], seen: list[set[int]]) -> float | None:
    hits = [result in tokens for row, tokens in zip(results, seen, strict=True) for result in row]
    return sum(hits) / len(hits) if hits else None


def plot_similarity(path: Path, found: KVSimilarity, title: str) -> None:
    """Draw the cosines of latent and explicit keys and values, averaged over rows.

    The upper row shows slots against tokens of the trace, the lower row layers against slots, with what compression
    keeps.
    """
    pyplot = pyplot_for_files()
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), layout="constrained")
    for column, name in enumerate(("keys", "values")):
        by_token = _mean(getattr(found, name).mean(0), found.trace_mask[:, None])
        by_layer = _mean(getattr(found, f"kept_{name}").transpose(0, 1), found.valid[:, None])
        for axis, image, label, x, y in (
            (axes[0, column], by_token, f"{name}, mean over layers", "token of the trace", "latent token"),
            (axes[1, column], by_layer, f"{name} against the kept ones", "latent token", "layer"),
        ):
            drawn = axis.imshow(image, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
            axis.set_title(label, loc="left", fontsize=10)
            axis.set_xlabel(x)
            axis.set_ylabel(y)
            axis.locator_params(integer=True)
            figure.colorbar(drawn, ax=axis, label="cosine")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the rows where the mask is set; NaN, which is drawn blank, if there is none."""
    mask = mask.expand_as(values)
    return (values * mask).sum(0) / mask.sum(0).float().masked_fill(mask.sum(0) == 0, float("nan"))
