"""The door to vLLM for users: an engine that thinks, and the traces of what it thought."""

import uuid
from collections.abc import Sequence
from typing import Any

import torch

from ...common.hub import check_name
from ...common.settings_file import read_saved
from ...common.vllm_installed import require_vllm
from ..decoding import ThinkingTrace
from ..method import METHOD
from .models import DELIMITER
from .slots import TRACE
from .traces import unpacked


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
        ValueError: there is no such model, it is an adapter, it has no thinking modules, vLLM has no class for it that
            thinks, or a setting does not work with thinking states.
    """
    require_vllm("thinking_llm")
    if settings.get("revision"):  # whose settings are not those that are read here
        raise ValueError(
            f"revision={settings['revision']!r}: download it, and open the folder: thinking_llm(huggingface_hub."
            f"snapshot_download({model!r}, revision={settings['revision']!r}))"
        )
    token = settings["hf_token"] if isinstance(settings.get("hf_token"), str) else None
    check_name(model, token)
    saved = read_saved(model, METHOD.name, token)
    if saved.adapter is not None:
        raise ValueError(
            f"{model} is an adapter, and vLLM needs a full model. Merge it: model, tokenizer = FastThinkingModel."
            f"from_pretrained({model!r}, load_in_4bit=False); FastThinkingModel.merge(model).save_pretrained(FOLDER); "
            "tokenizer.save_pretrained(FOLDER)"
        )
    if not saved.settings:
        raise ValueError(
            f"{model} has no {METHOD.what}, so nothing would think: train it with HRPO, or use vllm.LLM for plain decoding"
        )
    from vllm import LLM

    class ThinkingLLM(LLM):
        def beam_search(self, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("beam_search: it sends completions as prompts, and prompts do not think; use generate")

    additional = {**settings.pop("additional_config", {}), "answer_delimiter": answer_delimiter}
    return ThinkingLLM(model=model, additional_config=additional, **settings)


def traced(params: Any) -> Any:
    """Return a copy of vLLM's `SamplingParams` that asks for the trace of a request. Each request needs its own copy.

    The engine keeps the trace in the host's memory until `take_traces`.
    """
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

    Raises:
        ValueError: the parameters were not made by `traced`, two requests share theirs, they are not those of `outputs`, or
            the traces were taken already. Nothing is taken then.
    """
    names = [(one.extra_args or {}).get(TRACE) for one in params]
    if None in names or len({*names}) < len(names) or len(names) != len(outputs):
        raise ValueError(
            "params: each request needs its own SamplingParams, made by traced: [traced(params) for _ in prompts]"
        )
    held = llm.collective_rpc("thinking_trace_requests", args=(names,))[0]
    for i, (found, output) in enumerate(zip(held, outputs, strict=True)):
        _check_requests(i, sorted(found), output)
    # As text, since the engine may run in another process. Each rank has the same traces
    return [
        [
            _trace(fields, completion)
            for fields, completion in zip(
                unpacked(llm.collective_rpc("take_thinking_traces_text", args=(name,))[0]),
                output.outputs,
                strict=True,
            )
        ]
        for name, output in zip(names, outputs, strict=True)
    ]


def _check_requests(i: int, found: list[str], output: Any) -> None:
    """Raise a ValueError if `found`, vLLM's names of traced requests, are not those of an output."""
    if not found:
        raise ValueError(f"params[{i}]: the engine has no trace of request {output.request_id}; it was taken already")
    many = len(output.outputs) > 1
    wanted = [f"{k}_{output.request_id}" if many else output.request_id for k in range(len(output.outputs))]
    own = [name[: -len("-8d929ca4")] for name in found]  # vLLM adds such characters to its users' names
    if own != sorted(wanted):
        raise ValueError(
            f"params[{i}] are those of request {', '.join(own)}, and outputs[{i}] is of {', '.join(wanted)}: give the "
            "parameters and outputs of one call, in the same order, and each call parameters of its own"
        )


def _trace(past: dict[str, torch.Tensor], completion: Any) -> ThinkingTrace:
    length = len(completion.token_ids)
    trace = ThinkingTrace(**{name: value[None, :length] for name, value in past.items()})
    if completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str):
        trace.thinking_mask[:, -1] = False  # the token that ends a text does not think
    return trace
