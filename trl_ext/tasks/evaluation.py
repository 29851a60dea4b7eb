"""Held-out accuracy with hybrid or plain decoding."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl.data_utils import apply_chat_template, is_conversational

from unsloth_ext.common.delimiter import DelimiterMatcher
from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.generation_arguments import check_context, end_tokens
from unsloth_ext.hrpo.decoding import hybrid_generate
from unsloth_ext.hrpo.residual import has_thinking

from .reward import final_answer, make_reward


@dataclass
class Evaluation:
    """Results over n problems.

    Attributes:
        n: number of problems.
        accuracy, low, high: share of right answers, with its 95% Wilson interval.
        format_rate: share of completions with exactly one delimiter and text after it.
        mean_length: mean number of tokens, EOS included.
        thinking_share: thinking tokens over all tokens (0 for plain decoding).
        completions: the texts, in the order of the rows.
    """

    n: int
    accuracy: float
    low: float
    high: float
    format_rate: float
    mean_length: float
    thinking_share: float
    completions: list[str]

    def numbers(self) -> dict[str, float]:
        """All results but the texts."""
        return {key: value for key, value in asdict(self).items() if key != "completions"}


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a proportion, by default at 95%.

    These few lines would be the only use of SciPy (`scipy.stats.binomtest`), which is not a dependency.
    """
    p, square = successes / n, z * z
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
    # Exact at both ends, where rounding would leave a bound inside the interval
    return 0.0 if not successes else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    delimiter: str = "####",
    max_new_tokens: int = 256,
    batch_size: int = 64,
    temperature: float = 1.0,
    do_sample: bool = False,
    thinking: str = "on",
    matcher: DelimiterMatcher | None = None,
    progress: bool = False,
) -> Evaluation:
    """Decode and score every row.

    Args:
        model: a causal LM, with thinking modules or not.
        tokenizer: its tokenizer.
        rows: the columns `prompt` and `answer`.
        delimiter: the text before the answer.
        max_new_tokens: maximum number of generated tokens.
        batch_size: rows per batch.
        temperature: of sampling, and of the thinking states even in greedy decoding (as in training).
        do_sample: sample instead of greedy decoding.
        thinking: `"on"`; an ablation of `hybrid_generate` (`"zero"`, `"shuffle"`, `"noise"`, `"interpolate"`); or
            `"off"`, which models without thinking modules always use.
        matcher: finds the delimiter in tokens; None: made here.
        progress: show a progress bar.
    """
    hybrid = thinking != "off" and has_thinking(model)
    if hybrid and matcher is None:
        matcher = DelimiterMatcher(tokenizer, delimiter, model.config.get_text_config().vocab_size)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer) or None,
    )
    if hybrid or do_sample:  # thinking states use them in greedy decoding too
        config.temperature, config.top_k, config.top_p = temperature, 0, 1.0
    texts, tokens, thought = [], 0, 0
    with evaluating(model):
        batches = range(0, len(rows), batch_size)
        for start in tqdm(batches, "Evaluating", leave=False, disable=None if progress else True):
            inputs = _tokenize(tokenizer, rows[start : start + batch_size]["prompt"]).to(model.device)
            if hybrid:
                out, trace = hybrid_generate(
                    model,
                    matcher=matcher,  # type: ignore[arg-type]  # made above
                    ablation=None if thinking == "on" else thinking,
                    return_trace=True,
                    generation_config=config,
                    **inputs,
                )
                thought += int(trace.thinking_mask.sum())
            else:
                check_context(model, inputs["attention_mask"].sum(1).tolist(), config)
                out = model.generate(generation_config=config, **inputs)
            completion = out[:, inputs["input_ids"].shape[1] :]
            ends = torch.isin(completion, completion.new_tensor(config.eos_token_id or []))
            tokens += int(((ends.cumsum(1) - ends.int()) == 0).sum())
            texts += tokenizer.batch_decode(completion, skip_special_tokens=True)
    right = int(sum(make_reward(delimiter)(texts, answer=rows["answer"])))
    n = len(rows)
    low, high = wilson_interval(right, n)
    return Evaluation(
        n=n,
        accuracy=right / n,
        low=low,
        high=high,
        format_rate=sum(final_answer(text, delimiter) is not None for text in texts) / n,
        mean_length=tokens / n,
        thinking_share=thought / max(tokens, 1),
        completions=texts,
    )


def check_room(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    new: int,
    most: int,
    limit: str,
    length: str = "max_seq_length",
) -> None:
    """Raise a ValueError if a prompt plus `new` tokens is longer than `most`.

    Args:
        tokenizer: the tokenizer.
        prompts: texts or conversations.
        new: maximum number of generated tokens.
        most: maximum length.
        limit: name of the field that `new` comes from, for the message.
        length: name of the field that `most` comes from.
    """
    lengths = []
    for start in range(0, len(prompts), 64):
        lengths += _tokenize(tokenizer, prompts[start : start + 64])["attention_mask"].sum(1).tolist()
    longest = max(lengths, default=0)
    if longest + new > most:
        raise ValueError(
            f"{length}={most}: prompt {lengths.index(longest)} has {longest} tokens, and {limit}={new} may "
            "follow; raise the first, lower the second, or remove that row"
        )


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list) -> Any:
    chat = is_conversational({"prompt": prompts[0]})
    if chat and tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, but the prompts are conversations; use a "
            "model tuned for chat, such as one called -Instruct, or set tokenizer.chat_template"
        )
    if chat:  # the template adds its own special tokens
        prompts = [apply_chat_template({"prompt": prompt}, tokenizer)["prompt"] for prompt in prompts]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", "return_token_type_ids": False}
    return tokenizer(list(prompts), add_special_tokens=not chat, **options)


class AccuracyCallback(TrainerCallback, ExportableState):
    """Evaluate on held-out rows when training starts, after a checkpoint is loaded, and every `every` steps.

    It does not change the random state of the training. Checkpoints hold the results, so a resumed run shows all of
    them.

    Args:
        every: number of steps between evaluations; 0: only at the start.
        measure: called with the model; its result has an `accuracy`.

    Attributes:
        before: the result at step 0. In a resumed run, its numbers, with the texts of the new evaluation.
        curve: (step, accuracy) pairs.
    """

    def __init__(self, every: int, measure: Callable[[torch.nn.Module], Any]):
        self.every, self.measure = every, measure
        self.before: Any = None
        self.curve: list[tuple[int, float]] = []

    def state(self) -> dict[str, Any]:
        """The state for trainer_state.json."""
        before = self.before and self.before.numbers()
        return {"args": {}, "attributes": {"before": before, "curve": [list(pair) for pair in self.curve]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        # A checkpoint of an earlier version has no entry for it, but saving needs one
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        if state.global_step:
            self.curve = [(step, accuracy) for step, accuracy in saved["curve"] if step < state.global_step]
        self.before = self._evaluate(state, model)
        if state.global_step and saved["before"]:
            former = getattr(self.before, "former_names", {})
            self.before = replace(self.before, **{former.get(name, name): x for name, x in saved["before"].items()})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._evaluate(state, model)

    def _evaluate(self, state: Any, model: Any) -> Any:
        with torch.random.fork_rng():
            result = self.measure(model)
        self.curve.append((state.global_step, result.accuracy))
        return result
