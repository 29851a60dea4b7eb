"""Which checkpoints vLLM takes for ones that think. vLLM itself is not needed."""

import types

import pytest

import patches


@pytest.mark.parametrize("thinking", [None, True, "auto", {}, {"type": "enabled"}])
def test_a_key_of_the_same_name_in_another_models_config_is_not_ours(thinking):
    config = types.SimpleNamespace(architectures=["LlamaForCausalLM"], thinking=thinking)
    parse = patches.get("vllm_checkpoints").wrap(lambda *_, **__: ({}, config))
    parse(None, "model", False)
    assert config.architectures == ["LlamaForCausalLM"]
