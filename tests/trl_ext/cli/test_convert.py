"""`latent-reasoning convert`: what is written is the same model."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests.kinds import ALL, saved
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from trl_ext.cli import convert
from unsloth_ext.common.model_card import with_results
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


@pytest.mark.parametrize(
    "setups, how", [(hrpo, "A model of the method hrpo"), (kv, "A model trained by KV distillation")]
)
def test_the_card_still_says_how_it_was_trained(tmp_path, setups, how):
    trainer = setups.hrpo(tmp_path, max_steps=1) if setups is hrpo else setups.trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    convert.main([str(tmp_path / "final"), str(tmp_path / "whole")])
    was, found = ((tmp_path / name / "README.md").read_text() for name in ("final", "whole"))
    assert f"# {how}" in found and "The folder holds a full model" in found
    assert found.count("## Training\n") == 1 and found.split("## Training\n")[1] == was.split("## Training\n")[1]


def test_the_card_keeps_what_others_wrote(tmp_path):
    """License, base, notes, results, pictures. The tags of an adapter go, and a plain model has no results of another."""
    folder = saved("hrpo", True, tmp_path)
    page = ModelCard(with_results((folder / "README.md").read_text(), "## Results\n\n75% ![c](curves.png)"))
    page.data["license"], page.data["base_model"], page.data["tags"] = (
        "mit",
        "some/base",
        ["peft", "lora", "hrpo", "mine"],
    )
    page.text = f"\nMy notes.\n{page.text}"
    (folder / "README.md").write_text(str(page))
    (folder / "curves.png").write_bytes(b"picture")
    convert.main([str(folder), str(tmp_path / "whole")])
    found = ModelCard.load(tmp_path / "whole" / "README.md")
    assert "My notes." in found.text and "75% ![c](curves.png)" in found.text and "`some/base`" in found.text
    assert (found.data.license, found.data.base_model) == ("mit", "some/base")
    assert {"hrpo", "mine"} <= set(found.data.tags) and not {"peft", "lora"} & set(found.data.tags)
    assert (tmp_path / "whole" / "curves.png").read_bytes() == b"picture"
    convert.main([str(folder), str(tmp_path / "plain"), "--plain"])
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "# A model trained by HRPO" in plain and "AutoModelForCausalLM" in plain and "75%" not in plain
    assert "What other loaders leave out" not in plain and "My notes." in plain


def test_a_card_of_somebody_else_is_copied(tmp_path):
    folder = saved("plain", False, tmp_path)
    (folder / "README.md").write_text("# Mine\n")
    convert.main([str(folder), str(tmp_path / "whole")])
    assert (tmp_path / "whole" / "README.md").read_text() == "# Mine\n"


def test_a_damaged_card_is_told_before_anything_is_written(tmp_path):
    folder = saved("plain", False, tmp_path)
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"README\.md cannot be read as a model card"):
        convert.main([str(folder), str(tmp_path / "whole")])
    assert not (tmp_path / "whole").exists()


def test_nothing_is_overwritten(tmp_path):
    folder = saved("plain", False, tmp_path)
    for output in (folder, folder / "config.json"):
        with pytest.raises(ValueError, match="holds something already; name a new folder"):
            convert.main([str(folder), str(output)])
