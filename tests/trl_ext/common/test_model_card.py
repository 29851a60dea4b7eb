"""Cards of what trainers save: of ordinary models, of a method's, and TRL's at the root of a run."""

from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from patches import fused_lm_head
from tests import tiny
from trl_ext import KVDistillConfig
from trl_ext.common.checkpointing import SafeCheckpointMixin
from trl_ext.common.model_card import own_settings
from unsloth_ext import attach_planner, attach_thinking


class Trainer(SafeCheckpointMixin, SFTTrainer):
    """The smallest there is."""


def trained(model, folder="run", steps=1, resume=False, tokenizer=None, **more):
    fused_lm_head.ensure()
    args = SFTConfig(
        folder, max_steps=steps, save_steps=1, use_cpu=True, report_to="none", bf16=False, per_device_train_batch_size=1
    )
    rows = Dataset.from_dict({"text": ["1+2=3"] * 4})
    trainer = Trainer(model, args, train_dataset=rows, processing_class=tokenizer or tiny.tokenizer(), **more)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(f"{folder}/final")
    return trainer


@pytest.mark.parametrize("lora, run", [(True, "run"), (False, 'a "run" \\ [/b]')])
def test_an_ordinary_model_has_a_card_that_opens_it(tmp_path, monkeypatch, lora, run):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("base")
    base = type(tiny.model()).from_pretrained("base")
    trained(base, run, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM") if lora else None)
    for place in (f"{run}/final", f"{run}/checkpoint-1"):
        card = ModelCard.load(f"{place}/README.md")
        assert "# A model trained by SFT" in card.text and "every loader reads the whole of it" in card.text
        assert f"The folder holds {'an adapter (PEFT)' if lora else 'a full model'}" in card.text
        assert "More Information Needed" not in card.text and "sft" in card.data.tags
        assert card.data.library_name == ("peft" if lora else "transformers")
    code = ModelCard.load(f"{run}/final/README.md").text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "card", "exec"), {})


@pytest.mark.parametrize("attach", [lambda model: model, attach_thinking])
def test_a_model_with_a_chat_template_is_asked_in_it(tmp_path, monkeypatch, capsys, attach):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %};"
    trained(attach(tiny.model()), tokenizer=tokenizer)
    code = Path("run/final/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'apply_chat_template(\n    [[{"role": "user", "content": "1+2="}]]' in code
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("1+2=;")


def test_the_card_of_a_run_is_trls_with_our_way_to_open_it(tmp_path, monkeypatch):
    """A pipeline would drop the method. What somebody has written stays, from one save to the next and on resume."""
    monkeypatch.chdir(tmp_path)
    trained(attach_thinking(tiny.model()))
    file = Path("run/README.md")
    text = file.read_text()
    assert "This model was trained with SFT" in text and "Cite TRL as" in text
    assert "[None]" not in text and "It has been trained using [TRL]" in text
    assert "pipeline(" not in text.split("## What other loaders")[0] and "FastThinkingModel.from_pretrained" in text
    assert ModelCard(text).data.library_name == "latent-reasoning-trl"
    assert not Path("run/latent_reasoning.json").exists() and Path("run/final/latent_reasoning.json").exists()
    file.write_text(f"{text}\n## Mine\n")
    trained(attach_thinking(tiny.model()), steps=2, resume="run/checkpoint-1")
    again = file.read_text()
    assert "## Mine" in again and again.count("FastThinkingModel.from_pretrained") == text.count(
        "FastThinkingModel.from_pretrained"
    )


def test_settings_in_a_card_are_what_our_configuration_adds():
    args = KVDistillConfig("run", kv_projection_mode="flat", report_to="none", use_cpu=True, bf16=False)
    found = own_settings(args)
    assert found["kv_projection_mode"] == "flat" and not {"learning_rate", "output_dir", "max_length"} & found.keys()
    assert own_settings(SFTConfig("run", report_to="none", use_cpu=True, bf16=False)) == {}


@pytest.mark.parametrize("case", ["missing", "planner", "no tokenizer", "named in memory"])
def test_every_trainer_says_what_is_wrong_with_a_models_folder_before_it_is_loaded(tmp_path, case):
    folder, given = tmp_path / "folder", tiny.tokenizer()
    if case != "missing":
        (attach_planner(tiny.model()) if case == "planner" else tiny.model()).save_pretrained(folder)
    if "tokenizer" in case or "memory" in case:
        given = None
    model = tiny.model()
    model.config._name_or_path = str(folder)
    message = {
        "missing": f"there is no folder {folder}",
        "planner": r"a model of the method planner .*PlannerExecutorModel\.from_pretrained",
    }.get(case, r"has no tokenizer_config\.json")
    args = SFTConfig(str(tmp_path / "run"), use_cpu=True, report_to="none", bf16=False)
    rows = Dataset.from_dict({"text": ["1+2=3"] * 4})
    with pytest.raises(ValueError, match=message):
        Trainer(model if "memory" in case else str(folder), args, train_dataset=rows, processing_class=given)
