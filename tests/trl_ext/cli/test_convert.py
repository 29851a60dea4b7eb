"""`latent-reasoning convert`: what is written is the same model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.kinds import ALL, saved
from trl_ext.cli import convert
from unsloth_ext.common.text_model import TextModel


PROMPTS = ["1+2=", "3+4+5="]


def texts(folder, state="on"):
    model = TextModel.from_pretrained(str(folder))
    return model, model.decode(
        model.complete(**model.tokenize(PROMPTS), state=state, max_new_tokens=8, do_sample=False)
    )


@pytest.mark.parametrize("method, peft", ALL)
def test_a_whole_model_writes_the_same_texts(tmp_path, method, peft, capsys):
    folder = saved(method, peft, tmp_path)
    (folder / "training_args.json").write_text(json.dumps({"answer_delimiter": "##"}))
    assert convert.main([str(folder), str(tmp_path / "whole")]) == 0
    assert f"a {method} model of " in capsys.readouterr().out
    (before, theirs), (after, ours) = texts(folder), texts(tmp_path / "whole")
    assert ours == theirs and after.kind == method and after.delimiter == "##"
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


@pytest.mark.parametrize("peft", [True, False])
def test_a_plain_model_writes_what_the_model_writes_without_thinking(tmp_path, peft):
    """By transformers alone; its configuration knows nothing of the method."""
    folder = saved("hrpo", peft, tmp_path)
    convert.main([str(folder), str(tmp_path / "plain"), "--plain"])
    _, want = texts(folder, "off")
    opened, ours = texts(tmp_path / "plain")
    assert ours == want and opened.kind == "plain"
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any("thinking" in name for name, _ in stock.named_parameters()) and not hasattr(stock.config, "thinking")


def test_a_dtype_is_kept(tmp_path):
    folder = saved("plain", False, tmp_path)
    convert.main([str(folder), str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["latent", "concept", "planner"])
def test_what_is_another_model_is_refused(tmp_path, method):
    folder = saved(method, True, tmp_path)
    with pytest.raises(ValueError, match=f"--plain: a {method} model without its .* is another model"):
        convert.main([str(folder), str(tmp_path / "plain"), "--plain"])
    assert not (tmp_path / "plain").exists()


def test_nothing_is_overwritten(tmp_path):
    folder = saved("plain", False, tmp_path)
    for output in (folder, folder / "config.json"):
        with pytest.raises(ValueError, match="holds something already; name a new folder"):
            convert.main([str(folder), str(output)])
