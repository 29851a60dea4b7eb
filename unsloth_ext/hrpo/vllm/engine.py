"""The door to vLLM for users: an engine that thinks, and the traces of what it thought."""

import uuid
from collections.abc import Sequence
from typing import Any

import torch

from ..decoding import ThinkingTrace
from .models import DELIMITER
from .slots import TRACE


def thinking_llm(model: str, answer_delimiter: str = DELIMITER, **settings: Any) -> Any:
    """Make a vLLM engine that decodes with thinking states.

    Args:
        model: a folder or a repository with a full model that has thinking modules.
        answer_delimiter: the text that ends the thinking.
        **settings: as for `vllm.LLM`.

    Returns:
        A `vllm.LLM`. Its `generate` and `chat` think.

    Raises:
        ImportError: vLLM is not installed, or not in a version that was tested.
        ValueError: the model has no thinking modules, or vLLM has no class for it that thinks.
    """
    from vllm import LLM

    additional = {**settings.pop("additional_config", {}), "answer_delimiter": answer_delimiter}
    return LLM(model=model, additional_config=additional, **settings)


def traced(params: Any) -> Any:
    """Return a copy of vLLM's `SamplingParams` that asks for the trace of a request. Each request needs its own copy."""
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), TRACE: uuid.uuid4().hex}
    return params


def take_traces(llm: Any, params: Sequence[Any], outputs: Sequence[Any]) -> list[list[ThinkingTrace]]:
    """Return, once, what requests thought.

    Args:
        llm: the engine.
        params: the `SamplingParams` of each request, made by `traced`.
        outputs: what `llm.generate` returned for them.

    Returns:
        For each request one trace for each of its completions, of one row (1, C), on the CPU.
    """
    names = [one.extra_args[TRACE] for one in params]
    found = llm.collective_rpc("take_thinking_traces", args=(names,))[0]
    return [
        [_trace(past, one) for (_, past), one in zip(sorted(parts, key=_number), output.outputs, strict=True)]
        for parts, output in zip(found, outputs, strict=True)
    ]


def _number(part: tuple[str, Any]) -> int:
    """The number of a completion among the `n` of its request. vLLM calls them "0_NAME", "1_NAME"."""
    number, _, rest = part[0].partition("_")
    return int(number) if rest and number.isdigit() else 0


def _trace(past: dict[str, torch.Tensor], completion: Any) -> ThinkingTrace:
    length = len(completion.token_ids)
    trace = ThinkingTrace(**{name: value[None, :length] for name, value in past.items()})
    if completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str):
        trace.thinking_mask[:, -1] = False  # the token that ends a text does not think
    return trace
