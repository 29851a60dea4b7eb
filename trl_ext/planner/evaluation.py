"""Evaluation of plans: texts written from them, and from worse plans."""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.generation_arguments import end_tokens
from unsloth_ext.common.logits import logits_of
from unsloth_ext.common.wrapping import backbone_of, unwrapped
from unsloth_ext.planner.executor import executor_forward, executor_prefix, text_nll
from unsloth_ext.planner.model import PlannerExecutorModel
from unsloth_ext.planner.vocabulary import plan_lengths

from ..tasks.evaluation import wilson_interval
from ..tasks.reward import make_reward
from . import monitors


@dataclass
class PlanEvaluation:
    """Results over n texts with greedy plans. NLLs are nats per token, the end of the text included.

    Attributes:
        n: number of texts.
        accuracy, low, high: share of right greedy answers, with its 95% Wilson interval.
        random_accuracy: the same with random plans of the same lengths.
        token_accuracy: share of tokens that are the most likely next token under their plans.
        nll: of the texts under their plans.
        nll_null, nll_shuffled, nll_random: without a plan, under another text's plan, under a random plan.
        lengths: mean number of concepts, by type.
        perplexity: exp of the entropy of concept usage, by type.
        distinct: number of different plans, as a share of the texts.
        bits: capacity of a mean plan, log2 V per concept.
        explained_bits: bits that a mean text costs less with its plan than without. If this is much more than `bits`,
            the model is poor without a plan.
        ratio: tokens of a text per concept.
        plan_ms, write_ms: wall time per text for planning and writing, in batches.
        samples: the first texts as (text, plan, written from the plan, written from a random plan).
    """

    former_names: ClassVar = {"told": "explained_bits"}  # in the checkpoints of earlier versions

    n: int
    accuracy: float
    low: float
    high: float
    random_accuracy: float
    token_accuracy: float
    nll: float
    nll_null: float
    nll_shuffled: float
    nll_random: float
    lengths: dict[str, float]
    perplexity: dict[str, float]
    distinct: float
    bits: float
    explained_bits: float
    ratio: float
    plan_ms: float
    write_ms: float
    samples: list[tuple[str, list[list[int]], str, str]] = field(repr=False)

    def numbers(self) -> dict[str, object]:
        """All results but the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}


@torch.no_grad()
def evaluate_plans(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    mode: str = "generate",
    delimiter: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    show: int = 12,
    progress: bool = False,
) -> PlanEvaluation:
    """Evaluate plans and the texts written from them. Ours.

    Args:
        model: a causal LM with a planner.
        tokenizer: its tokenizer.
        rows: plain texts in the columns `prompt`, `completion` and `answer`.
        mode: `"generate"`: the planner reads the prompt, and the completion is written; `"reconstruct"`: it reads both,
            and both are written.
        delimiter: the text before the answer; None: the text is the answer.
        max_new_tokens: maximum number of generated tokens.
        batch_size: rows per batch.
        show: number of samples to keep.
        progress: show a progress bar.

    Returns:
        The results, a `PlanEvaluation`.
    """
    planner, generator = PlannerExecutorModel(model, tokenizer), torch.Generator().manual_seed(0)
    types = backbone_of(model).planner_config.types
    sizes = [kind.num_concepts for kind in types]
    names = ("nll", "null", "shuffled", "random")
    sums, tokens, hits, right, by_chance = dict.fromkeys(names, 0.0), 0, 0, 0, 0
    plans: list[torch.Tensor] = []
    samples: list[Any] = []
    clock = {"plan": 0.0, "write": 0.0}
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": end_tokens(model, tokenizer) or None}

    def timed(name, work):
        started = time.perf_counter()
        out = work()
        clock[name] += time.perf_counter() - started
        return out

    with evaluating(model):
        for start in tqdm(
            range(0, len(rows), batch_size), "Evaluating", leave=False, disable=None if progress else True
        ):
            part = rows[start : start + batch_size]
            whole = [a + b for a, b in zip(part["prompt"], part["completion"])]
            read, texts = (whole, whole) if mode == "reconstruct" else (part["prompt"], part["completion"])
            own = timed("plan", lambda read=read: planner.plan(read))
            written = timed("write", lambda own=own: planner.execute(own, **how))
            drawn = monitors.random_like(own, sizes, generator)
            unplanned = planner.execute(drawn, **how)
            answers = texts if delimiter is None else part["answer"]
            right += _right(written, answers, delimiter)
            by_chance += _right(unplanned, answers, delimiter)
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ended = [[*ids, *end] for ids in tokenizer(texts)["input_ids"]]
            batch = tokenizer.pad({"input_ids": ended}, padding_side="right", return_tensors="pt").to(model.device)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            tokens += mask.sum().item()
            others = monitors.shuffled(own, generator) if len(own) > 1 else own
            null = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            hidden = executor_forward(model, executor_prefix(model, own), ids, mask)
            logits, real = logits_of(unwrapped(model), hidden[mask.bool()]), ids[mask.bool()]
            sums["nll"] += F.cross_entropy(logits.float(), real, reduction="sum").item()
            hits += (logits.argmax(-1) == real).sum().item()
            for name, prefix in zip(names[1:], (own, others, drawn)):
                slots = executor_prefix(model, prefix, null if name == "null" else None)
                sums[name] += text_nll(model, slots, ids, mask).sum().item()
            plans.append(own.cpu())
            for i in range(max(0, min(len(texts), show - len(samples)))):
                shown = [[code for code in codes if code >= 0] for codes in own[i].tolist()]
                samples.append((texts[i], shown, written[i], unplanned[i]))
    together = torch.cat(plans)
    lengths = plan_lengths(together).double().mean(0).tolist()
    n = len(rows)
    low, high = wilson_interval(right, n)
    return PlanEvaluation(
        n=n,
        accuracy=right / n,
        low=low,
        high=high,
        random_accuracy=by_chance / n,
        token_accuracy=hits / tokens,
        nll=sums["nll"] / tokens,
        nll_null=sums["null"] / tokens,
        nll_shuffled=sums["shuffled"] / tokens,
        nll_random=sums["random"] / tokens,
        lengths={kind.name: length for kind, length in zip(types, lengths)},
        perplexity={kind.name: _perplexity(together[:, i], kind.num_concepts) for i, kind in enumerate(types)},
        distinct=len(together.flatten(1).unique(dim=0)) / n,
        bits=sum(length * torch.tensor(float(size)).log2().item() for length, size in zip(lengths, sizes)),
        explained_bits=(sums["null"] - sums["nll"]) / n / math.log(2),
        ratio=tokens / n / max(sum(lengths), 1e-9),
        plan_ms=1000 * clock["plan"] / n,
        write_ms=1000 * clock["write"] / n,
        samples=samples,
    )


def _right(texts: list[str], answers: list[str], delimiter: str | None) -> int:
    if delimiter is None:
        return sum(text.strip() == answer.strip() for text, answer in zip(texts, answers))
    return int(sum(make_reward(delimiter)(texts, answer=answers)))


def _perplexity(ids: torch.Tensor, size: int) -> float:
    counts = torch.bincount(ids[ids >= 0], minlength=size).double()
    share = counts / counts.sum().clamp(min=1)
    return (-torch.special.xlogy(share, share).sum()).exp().item()
