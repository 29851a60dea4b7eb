"""The model class with which lm-evaluation-harness evaluates models of every kind.

Importing this module registers it as "latent-reasoning":

>>> import lm_eval
>>> from trl_ext.evaluation.lm_eval_model import LatentReasoningLM
>>> lm_eval.simple_evaluate(model="latent-reasoning", model_args={"pretrained": "runs/hrpo_tiny/final"}, tasks=["gsm8k"])
"""

import sys
import time
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm.auto import tqdm
from transformers import StopStringCriteria

from unsloth_ext.common.generation_arguments import context_of
from unsloth_ext.common.text_model import OF_ANOTHER_ROW, TextModel


@register_model("latent-reasoning")
class LatentReasoningLM(HFLM):
    """lm-eval's transformers model, which writes and scores with the latent steps of the model's method.

    Everything else is lm-eval's own: batches, chat templates, few-shot prompts, stop strings and caches of requests. It
    runs in one process.

    Args:
        pretrained: a folder, a hub id, or an opened `TextModel`.
        state: what is done to the latent steps: "on", or one of the kind's ablations, among them "off".
        delimiter: the text that ends the thinking; None: the one of the training, else "####".
        thinking_temperature: temperature of soft embeddings in greedy decoding (HRPO).
        batch_size: prompts per batch; "auto" is lm-eval's search.
        dtype: such as "bfloat16"; None: as the loader of the kind decides.
        engine: decodes in its states, see `trl_ext.evaluation.engine.Engine`; None: transformers decodes in all.
        **kwargs: other keywords of lm-eval's `HFLM`, such as `max_length`.

    Attributes:
        opened: the `TextModel`.
        costs: sums over all completions: `completions`, `tokens`, `forwards`, `latent` (see `Completions`), and `seconds`.

    Raises:
        ValueError: there is no such model, or it has no such state.
    """

    def __init__(
        self,
        pretrained: str | TextModel,
        state: str = "on",
        delimiter: str | None = None,
        thinking_temperature: float = 1.0,
        batch_size: int | str = 64,
        dtype: str | None = None,
        engine: Any = None,
        **kwargs: Any,
    ):
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if isinstance(pretrained, str):
            pretrained = TextModel.from_pretrained(pretrained, delimiter=delimiter, **given).to_accelerator()
        pretrained.check_state(state)
        self.opened, self.state, self.thinking_temperature, self.engine = (
            pretrained,
            state,
            thinking_temperature,
            engine,
        )
        self.searched: dict[tuple[str, ...], bool] = {}
        self.built, self.strings, self.questions = False, list[str](), list[str]()
        self.forget_costs()
        kwargs.pop("device", None)  # the model is where it is
        super().__init__(
            pretrained=pretrained.model,
            tokenizer=pretrained.tokenizer,
            backend="causal",
            batch_size=batch_size,
            **kwargs,
        )
        self.built = True
        self.pretrained = getattr(pretrained.model, "name_or_path", "")  # for the record of a run, which is JSON

    @property
    def model(self) -> Any:
        """The causal LM. None while lm-eval builds this object, when it would tie weights that the loader has tied.

        PEFT 0.21 fails at that where single rows of an embedding are trained.
        """
        return self._model if self.built else None

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize prompts as in training: (B, P) ids and mask, padded on the left.

        A chat template has written the token that begins a text already. Nothing is cut off: a prompt that is too long is
        refused when it is completed.
        """
        self.strings = strings
        batch = self.opened.tokenize(strings)
        return batch["input_ids"], batch["attention_mask"]

    @property
    def max_length(self) -> int:
        """The number of positions of the model, or what was given; a large number if the model has no limit."""
        return self._max_length or context_of(self.opened.model) or 2**20

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize as lm-eval does, without a token that ends a text, which some tokenizers add."""
        ids = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id and not string.endswith(self.tokenizer.eos_token)
        return ids[:-1] if ended else ids

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Write a text for each request.

        Raises:
            ValueError: a text may be longer than the model; or the state takes latent steps of another question, and there
                is one question.
        """
        for request in requests:
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise ValueError(
                    f"{request.task_name}: answers of up to {new} tokens, and the model has {self.max_length} "
                    "positions for question and answer; lower max_new_tokens (of a task: max_gen_toks)"
                )
        self.questions = list(dict.fromkeys(request.args[0] for request in requests))
        if self.state in OF_ANOTHER_ROW and len(self.questions) < 2:
            raise ValueError(f"state={self.state!r}: it takes the latent steps of another question, and there is one")
        # In a file, bars would be one endless line
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _beside_others(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Put another question before each row, whose latent steps the row gets: (2 B, P) ids and mask.

        The rows are those of the batch that was tokenized last. The question is the next one of all requests. Its own
        latent steps are replaced by those of the row before it.
        """
        at = {question: i for i, question in enumerate(self.questions)}
        others = [self.questions[(at[text] + 1) % len(self.questions)] for text in self.strings]
        batch = self.opened.tokenize([text for pair in zip(others, self.strings, strict=True) for text in pair])
        return batch["input_ids"], batch["attention_mask"]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        greedy = not generation_kwargs.get("do_sample") and not generation_kwargs.get("temperature")
        generation_kwargs["do_sample"] = not greedy
        if greedy:
            generation_kwargs.pop("temperature", None)
            if self.opened.kind == "hrpo":
                generation_kwargs.update(temperature=self.thinking_temperature, top_k=0, top_p=1.0)
        ends = {self.tokenizer.eos_token, ""}
        stops = [text for text in dict.fromkeys(stop) if text not in ends]
        if stops and self._can_search(tuple(stops)):
            generation_kwargs["stop_strings"] = stops
        ids, mask = context, generation_kwargs.pop("attention_mask")
        each = 1
        if self.state in OF_ANOTHER_ROW:
            (ids, mask), each = self._beside_others(), 2
        began = time.perf_counter()
        decodes = self.opened if self.engine is None or self.state not in self.engine.states else self.engine
        written = decodes.complete(
            ids, mask, state=self.state, max_new_tokens=max_length - context.shape[1], **generation_kwargs
        )
        self.costs["seconds"] += (time.perf_counter() - began) / each
        self.costs["completions"] += len(context)
        for name, counts in (("tokens", written.lengths), ("forwards", written.forwards), ("latent", written.latent)):
            self.costs[name] += int(counts[each - 1 :: each].sum())
        return torch.cat([context, written.tokens[each - 1 :: each].to(context.device)], dim=1)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log p(continuation | context) of token ids, in batches of similar length."""
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 64)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found: list[Any] = [None] * len(requests)
        for start in tqdm(range(0, len(order), size), "Scoring", disable=disable_tqdm or not sys.stderr.isatty()):
            part = order[start : start + size]
            contexts, continuations = ([requests[i][k] for i in part] for k in (1, 2))
            longest = max(len(a) + len(b) for a, b in zip(contexts, continuations, strict=True))
            if longest > self.max_length:
                raise ValueError(f"a row has {longest} tokens, more than the model's {self.max_length} positions")
            scores = self.opened.log_likelihood(contexts, continuations, state=self.state)
            for i, score in zip(part, scores, strict=True):
                found[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return found

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations.

        Raises:
            ValueError: they have no meaning for this kind of model.
        """
        self._refuse("loglikelihood", requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts.

        Raises:
            ValueError: they have no meaning for this kind of model.
        """
        self._refuse("loglikelihood_rolling", requests)
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def why_not(self, output_type: str) -> str | None:
        """Why this model and state cannot do a kind of task, or None.

        Args:
            output_type: `generate_until`, `loglikelihood`, `multiple_choice` or `loglikelihood_rolling`, as lm-eval calls
                them.
        """
        if output_type == "generate_until":
            return None
        if output_type == "loglikelihood_rolling" and self.opened.kind in ("latent", "planner") and self.state != "off":
            return f"a {self.opened.kind} model reads a question before it writes, and a whole text has none"
        return self.opened.no_likelihood(self.state)

    def _can_search(self, stops: tuple[str, ...]) -> bool:
        """Whether generation can stop at these texts. Where a tokenizer cannot spell them, lm-eval cuts the text later."""
        if stops not in self.searched:
            try:
                StopStringCriteria(self.tokenizer, list(stops))
                self.searched[stops] = True
            except ValueError:
                self.searched[stops] = False
        return self.searched[stops]

    def forget_costs(self) -> None:
        """Set the sums of `costs` to zero."""
        self.costs = dict.fromkeys(("completions", "tokens", "forwards", "latent", "seconds"), 0.0)

    def _refuse(self, output_type: str, requests: list) -> None:
        if why_not := self.why_not(output_type):
            tasks = sorted({str(request.task_name) for request in requests})
            raise ValueError(f"{', '.join(tasks)}: {why_not}")
