"""Switch with which Unsloth's forwards return the last hidden state instead of the logits, by Unsloth's own variable.

Unsloth multiplies by the LM head's weight without calling the module, so no hook sees the last hidden state.
"""

import os
from typing import Any

from .registry import Site, Switch


VARIABLE = "UNSLOTH_RETURN_HIDDEN_STATES"


def _sites(*_: Any) -> list[Site]:
    return [(os.environ, VARIABLE)]


PATCH = Switch(
    name="unsloth_hidden_states",
    package="unsloth",
    target=f"the environment variable {VARIABLE}",
    sites=_sites,
    value=lambda: "1",
    places=(
        "unsloth/models/llama.py:CausalLM_fast_forward",
        "unsloth/models/mistral.py:MistralForCausalLM_fast_forward",
    ),
    effect="Unsloth's forwards return the last hidden state instead of the logits.",
    reason="hybrid decoding on Unsloth, while it runs: thinking states are made from the last hidden state",
    upstream="no upstream issue is known; the variable is Unsloth's own",
    removable="when Unsloth's decoding calls the LM head as a module, or returns hidden states beside logits",
    scoped=True,
)
