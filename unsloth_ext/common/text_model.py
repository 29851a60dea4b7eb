"""`TextModel`: a saved model of any kind that completes texts, and what the completions cost."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import completions
from .completions import Completions
from .generation_arguments import context_of, left_padded
from .hub import base_of, check_name, check_vocabulary, has_tokenizer, load_adapter, load_causal_lm, load_tokenizer, nf4
from .method import Method
from .question_ids import question_ids
from .settings_file import method_of, read_json, saved_method
from .wrapping import backbone_of, causal_lm_of


OF_ANOTHER_ROW = ("shuffle", "interpolate")
"""States in which each row of a batch gets latent steps of the row before it."""


class TextModel:
    """A causal LM of any kind, its tokenizer, and how it completes texts.

    Args:
        model: the causal LM, with the modules of a method or without, wrapped by PEFT or not.
        tokenizer: its tokenizer.
        delimiter: the text that ends the thinking, for models that think until then.

    Attributes:
        model, tokenizer, delimiter: as given.
        method: the method of its modules. None for a plain model.
        states: what `complete` can do to the model's latent steps: `"on"`, and for some methods ablations, among them
            `"off"`, which decodes without them.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, delimiter: str = "####"):
        self.model, self.tokenizer, self.delimiter = model, tokenizer, delimiter
        self.method: Method | None = method_of(causal_lm_of(model).config)[0]

    @property
    def kind(self) -> str:
        """The name of the method, or "plain"."""
        return self.method.name if self.method else "plain"

    @property
    def states(self) -> tuple[str, ...]:
        """What `complete` accepts as `state`."""
        return self.method.states if self.method else ("on",)

    def to_accelerator(self) -> Self:
        """Move the model to the GPU, if there is one and the loader has not placed it."""
        if torch.cuda.is_available() and self.model.device.type == "cpu":
            self.model.to("cuda")
        return self

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        delimiter: str | None = None,
        token: str | None = None,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Open a folder or hub id: a full model or an adapter, with the modules of a method or without.

        Args:
            name: a folder or a hub id.
            delimiter: the text that ends the thinking. None means the one of the training, if the folder says it, else
                "####".
            token: the access token for the hub.
            load_in_4bit: load the base model in 4 bits (NF4, with bitsandbytes).
            **kwargs: keywords for `from_pretrained`, such as `dtype="bfloat16"`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: there is no such model, or files are damaged or lack tensors.
        """
        check_name(name, token)
        method = saved_method(name, token)
        if method is not None:
            load = method.loader_class().from_pretrained
            if "load_in_4bit" in inspect.signature(load).parameters:  # on a GPU it would quantise without a word
                kwargs["load_in_4bit"] = load_in_4bit
            elif load_in_4bit:
                kwargs["quantization_config"] = nf4(kwargs.get("dtype"))
            opened = load(name, token=token, **kwargs)
            model, tokenizer = opened if isinstance(opened, tuple) else (opened.model, opened.tokenizer)
        else:
            adapter = read_json(name, "adapter_config.json", token)
            base = name if adapter is None else base_of(adapter, name)
            tokenizer = load_tokenizer(name if has_tokenizer(name, token) else base, token, padding_side="left")
            if load_in_4bit:
                kwargs["quantization_config"] = nf4(kwargs.get("dtype"))
            model = load_causal_lm(base, token=token, **kwargs)
            check_vocabulary(model, tokenizer, name)
            if adapter is not None:
                model = load_adapter(model, name, token=token)
        trained = trained_with(name, token)
        tags = trained.get("tags") or []  # of reasoning distillation: the answer stands between the last two
        found = trained.get("answer_delimiter") or (tags[2] if len(tags) == 4 else "####")
        return cls(model.eval(), tokenizer, delimiter or found)

    def tokenize(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` of texts, both (B, P) long, padded on the left."""
        rows = [question_ids(self.tokenizer, prompt) for prompt in prompts]
        return {name: x.to(self.model.device) for name, x in left_padded(self.tokenizer, rows).items()}

    def room(self, prompt: int) -> float:
        """Return how many tokens may follow a prompt of so many, before the model has no positions left."""
        config = backbone_of(self.model)
        beside = {
            "latent": lambda: config.latent_config.num_latents + 2,
            "planner": lambda: config.planner_config.max_quota + 1,
        }
        most = context_of(self.model)
        return math.inf if most is None else most - prompt - beside.get(self.kind, lambda: 0)()

    def complete(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, state: str = "on", **generate_kwargs: Any
    ) -> Completions:
        """Complete prompts.

        Args:
            input_ids (B, P): long, left-padded.
            attention_mask (B, P): long.
            state: one of `states`.
            **generate_kwargs: as for `generate`. docs/generation.md lists what works.

        Raises:
            ValueError: the state is unknown, an argument does not work with this kind of model, or a prompt is empty or
                leaves no room for the answer.
        """
        self.check_state(state)
        if state in OF_ANOTHER_ROW and len(input_ids) < 2:
            raise ValueError(f"state={state!r}: it takes the latent steps of another row, and this batch has one row")
        write: Callable[..., Completions] = completions.complete
        if self.method is not None and self.method.completion:
            write = self.method.completion_function()
        return write(
            self.model,
            self.tokenizer,
            input_ids,
            attention_mask,
            state=state,
            delimiter=self.delimiter,
            **generate_kwargs,
        )

    def log_likelihood(
        self, contexts: list[list[int]], continuations: list[list[int]], *, state: str = "on"
    ) -> list[tuple[float, bool]]:
        """Compute log p(continuation | context) of token ids, see `completions.log_likelihood`.

        Raises:
            ValueError: it has no meaning for this kind of model, or the state is unknown.
        """
        why_not = self.no_likelihood(state)
        if why_not:
            raise ValueError(why_not)
        compute: Callable[..., list[tuple[float, bool]]] = completions.log_likelihood
        if self.method is not None and state != "off" and self.method.likelihood != "forward":
            compute = self.method.likelihood_function()
        return compute(self.model, self.tokenizer, contexts, continuations)

    def no_likelihood(self, state: str) -> str | None:
        """Return why continuations have no likelihood in this state; None if they have one."""
        self.check_state(state)
        if self.method is None or state == "off" or (state == "on" and self.method.likelihood):
            return None
        off = "; state='off' measures the model without them" if "off" in self.states else ""
        return (
            f"state={state!r}: a continuation that is given has no likelihood under a {self.kind} model, whose "
            f"{self.method.what} are made while it writes{off}"
        )

    def check_state(self, state: str) -> None:
        """Raise a ValueError that lists the states if this kind of model has no such one."""
        if state not in self.states:
            raise ValueError(f"state={state!r}: a {self.kind} model has {', '.join(self.states)}")

    def decode(self, written: Completions) -> list[str]:
        """Return the texts of completions, without special tokens."""
        return self.tokenizer.batch_decode(written.tokens, skip_special_tokens=True)


def trained_with(name: str, token: str | None = None) -> dict[str, Any]:
    """Return the arguments that a trainer left with a model (`training_args.json`); empty if there are none.

    Args:
        name: a folder or a hub id.
        token: the access token for the hub.

    Raises:
        ValueError: the file is damaged.
    """
    found = read_json(name, "training_args.json", token) or {}
    if not isinstance(found.get("answer_delimiter", ""), str | None):
        raise ValueError(f"{name}/training_args.json is damaged: it does not hold the arguments of a training")
    return found
