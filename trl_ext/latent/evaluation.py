"""Held-out accuracy of a model with latent tokens: generated answers, forward passes, time."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from unsloth_ext.common.ablations import ABLATIONS
from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.generation_arguments import check_context
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.latent.engine import LatentEngine
from unsloth_ext.latent.model import latent_generate, question_batch

from ..tasks.evaluation import wilson_interval
from ..tasks.reward import final_answer, same_number


LATENTS = ("on", *ABLATIONS, "off")


@dataclass
class LatentEvaluation:
    """Results over n questions.

    Attributes:
        n: number of questions.
        accuracy, low, high: share of right answers, with its 95% Wilson interval.
        forward_passes: mean number of forward passes per question, for latent tokens and generated tokens.
        seconds: wall time per question, at the batch size of the evaluation.
        right: whether each answer is right.
        completions: the text generated after the latent tokens, or after the question without them.
    """

    n: int
    accuracy: float
    low: float
    high: float
    forward_passes: float
    seconds: float
    right: list[bool] = field(repr=False)
    completions: list[str] = field(repr=False)

    def numbers(self) -> dict[str, float]:
        """All fields that are single numbers."""
        return {key: value for key, value in asdict(self).items() if key not in ("right", "completions")}


def evaluate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    *,
    answer_prompt: str,
    max_new_tokens: int,
    batch_size: int = 64,
    latents: str = "on",
    engine: LatentEngine | None = None,
    progress: bool = False,
) -> LatentEvaluation:
    """Answer the `question` of each row greedily and compare the number after the answer prompt with `answer`.

    Args:
        model: a causal LM with latent tokens.
        tokenizer: its tokenizer.
        rows: dicts with `question` and `answer`.
        answer_prompt: the text before the answer.
        max_new_tokens: maximum number of generated tokens.
        batch_size: questions per batch.
        latents: `"on"`; an ablation that replaces every latent input: `"zero"`, `"shuffle"` (another row's), `"noise"`
            (same norm) or `"interpolate"` (halfway to another row's); or `"off"`: plain `generate` after the question, as
            for a model that writes explicit steps.
        engine: a vLLM engine that decodes the answers (docs/vllm.md). None means transformers.
        progress: show a progress bar.

    Raises:
        ValueError: `latents` is unknown, or there is no question or no batch.
    """
    if not rows or batch_size < 1:
        raise ValueError(f"{len(rows)} questions in batches of {batch_size}: both must be at least 1")
    if latents not in LATENTS:
        raise ValueError(f"latents={latents!r}: choose one of {', '.join(LATENTS)}")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts, passes, seconds = [], 0, 0.0
    if engine is not None:
        engine.update(model)  # its start is no part of an answer's time
    with evaluating(model):
        for start in tqdm(
            range(0, len(rows), batch_size), "Evaluating", leave=False, disable=None if progress else True
        ):
            questions = [row["question"] for row in rows[start : start + batch_size]]
            inputs = {k: v.to(model.device) for k, v in question_batch(tokenizer, questions).items()}
            began = time.perf_counter()
            if latents == "off":
                check_context(model, inputs["attention_mask"].sum(1).tolist(), config)
                with torch.no_grad():
                    if engine is None:
                        out = model.generate(generation_config=config, **inputs)
                    else:
                        embeds = backbone_of(model).get_input_embeddings()(inputs["input_ids"])
                        answers = engine.decode(model, embeds, inputs["attention_mask"], config)
                        out = torch.cat([inputs["input_ids"], answers], dim=1)
                prompt, before = inputs["input_ids"].shape[1], 0
            else:
                intervene = ABLATIONS.get(latents)
                out, state = latent_generate(
                    model, intervene=intervene, return_state=True, engine=engine, generation_config=config, **inputs
                )
                prompt, before = state.attention_mask.shape[1] + 1, state.num_forwards
            tokens = out[:, prompt:].cpu()
            seconds += time.perf_counter() - began
            ends = torch.isin(
                tokens, tokens.new_tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
            ).int()
            passes += before * len(questions) + int((ends.cumsum(1) - ends == 0).sum())
            texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    right = [is_right(text, row["answer"], answer_prompt) for text, row in zip(texts, rows, strict=True)]
    n = len(rows)
    low, high = wilson_interval(sum(right), n)
    return LatentEvaluation(n, sum(right) / n, low, high, passes / n, seconds / n, right, texts)


def is_right(completion: str, answer: str, answer_prompt: str) -> bool:
    """Whether the number after the answer prompt is `answer`."""
    found = final_answer(completion, answer_prompt.strip()) if answer_prompt.strip() else completion.strip()
    return bool(found) and same_number(answer, found)


def bootstrap_interval(right: list[list[bool]], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of mean accuracy, over seeds and questions.

    SciPy is not a dependency, and its `scipy.stats.bootstrap` does not resample seeds and questions together.

    Args:
        right: one list per seed, which says for each question whether its answer is right.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    table, rng = np.asarray(right, dtype=float), np.random.default_rng(seed)
    runs, n = table.shape
    # Resampling n values of 0 or 1 is a binomial draw
    drawn = rng.integers(runs, size=(resamples, runs))
    means = (rng.binomial(n, table.mean(1)[drawn]) / n).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
