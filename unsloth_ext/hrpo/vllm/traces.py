"""The traces of requests on their way out of vLLM: their order, and their form as text."""

import base64
import re
from collections.abc import Sequence

import torch
from safetensors.torch import load, save


Fields = dict[str, torch.Tensor]
# "3-8d929ca4": prompt 3 of `LLM.generate`; "cmpl-9f-3-8d929ca4": prompt 3 of a request to a server; before both: "1_", of
# n. vLLM adds the last eight characters, which can all be digits
NAME = re.compile(r"(?:(?P<completion>\d+)_)?.*?(?P<prompt>\d*)-[0-9a-f]{8}")


def in_order(parts: Sequence[tuple[str, Fields]]) -> list[Fields]:
    """Sort traces by prompt, and by completion among the `n` of a prompt.

    Args:
        parts: vLLM's name of each request, and its trace.

    Returns:
        The traces.

    Raises:
        ValueError: a name is not of vLLM's form.
    """

    def place(part: tuple[str, Fields]) -> tuple[int, int]:
        found = NAME.fullmatch(part[0])
        if found is None:
            raise ValueError(f"{part[0]!r}: vLLM gives its requests other names than this version of the plugin knows")
        return int(found["prompt"] or 0), int(found["completion"] or 0)

    return [fields for _, fields in sorted(parts, key=place)]


def packed(traces: Sequence[Fields]) -> str:
    """Write traces as text: safetensors, in base64."""
    tensors = {
        f"{row}.{name}": value.contiguous() for row, fields in enumerate(traces) for name, value in fields.items()
    }
    return base64.b64encode(save(tensors)).decode()


def unpacked(text: str) -> list[Fields]:
    """Read what `packed` wrote."""
    traces: dict[int, Fields] = {}
    for key, value in load(base64.b64decode(text)).items():
        row, _, name = key.partition(".")
        traces.setdefault(int(row), {})[name] = value
    return [traces[row] for row in range(len(traces))]
