"""What can be tested of the plugin without vLLM: the door's refusals, and the order and form of traces."""

import logging

import pytest
import torch

from patches import versions
from tests import tiny
from unsloth_ext import FastThinkingModel, thinking_llm
from unsloth_ext.common import vllm_installed
from unsloth_ext.hrpo.vllm import plugin
from unsloth_ext.hrpo.vllm.traces import in_order, packed, unpacked


@pytest.fixture
def installed(monkeypatch):
    """Pretend that vLLM is installed, in a tested version or in another."""

    def pretend(version):
        number = None if version is None else versions.Version(version)
        real = versions.installed_version
        for module in (versions, vllm_installed):
            monkeypatch.setattr(
                module, "installed_version", lambda package: number if package == "vllm" else real(package)
            )

    return pretend


def test_a_missing_vllm_is_an_error(installed):
    installed(None)
    with pytest.raises(ImportError, match=r"vLLM is not installed\. Run: pip install 'vllm==0\.31"):
        thinking_llm("no/such-model")


def test_an_untested_vllm_is_an_error(installed):
    installed("0.21.0")
    with pytest.raises(ImportError, match=r"vllm 0\.21\.0 is not among the tested versions"):
        thinking_llm("no/such-model")


def test_an_untested_vllm_starts_without_the_plugin(installed, caplog):
    """It must not fail for models of other people: vLLM calls the plugin for every model."""
    installed("0.21.0")
    with caplog.at_level(logging.WARNING):
        plugin.register()  # which would import vllm otherwise
    assert "vLLM cannot decode thinking states here: vllm 0.21.0" in caplog.text


def test_what_cannot_be_opened_is_refused_before_anything_starts(installed, tmp_path):
    installed("0.31.0")
    with pytest.raises(ValueError, match="there is no folder"):
        thinking_llm(str(tmp_path / "nowhere"))
    tiny.model("qwen2").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain has no thinking modules, so nothing would think"):
        thinking_llm(str(tmp_path / "plain"))
    FastThinkingModel.get_peft_model(tiny.model("qwen2"), r=2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter, and vLLM needs a full model\. Merge it: .*merge"):
        thinking_llm(str(tmp_path / "adapter"))
    with pytest.raises(
        ValueError, match=r"revision='v2': download it, .*snapshot_download\('me/thinks', revision='v2'\)"
    ):
        thinking_llm("me/thinks", revision="v2")


def parts(*names):
    return [(name, {"hidden_states": torch.tensor([[i]])}) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    "names, wanted",
    [
        (("3-8d929ca4", "0-00000000", "11-99999999", "2-12345678"), [1, 3, 0, 2]),
        (("1_3-8d929ca4", "0_3-12345678", "1_2-0000000a", "0_2-ffffffff"), [3, 2, 1, 0]),
        (("cmpl-9f-1-12345678", "cmpl-9f-0-8d929ca4"), [1, 0]),
        (("1_mine-12345678", "0_mine-8d929ca4"), [1, 0]),
    ],
)
def test_traces_are_sorted_by_prompt_and_completion(names, wanted):
    """vLLM adds eight random hexadecimal digits to a name, which can look like a number."""
    assert [int(fields["hidden_states"]) for fields in in_order(parts(*names))] == wanted


def test_a_name_that_vllm_does_not_give_is_an_error():
    with pytest.raises(ValueError, match="'3': vLLM gives its requests other names"):
        in_order(parts("3", "4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_as_text_are_the_same_traces(dtype):
    fields = [
        {"thinking_mask": torch.tensor([True, False]), "hidden_states": torch.randn(2, 3, dtype=dtype)} for _ in "ab"
    ]
    again = unpacked(packed(fields))
    assert len(again) == 2
    for one, other in zip(fields, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
