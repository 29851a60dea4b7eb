"""What cannot be trained is named before it begins."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from tests import tiny
from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from unsloth_ext import PlannerConfig, attach_planner, backbone_of

from . import setups


def build(folder, model=None, **keywords):
    return PlannerExecutorTrainer(
        tiny.model() if model is None else model,
        PlannerExecutorConfig(**setups.settings(folder)),
        train_dataset=setups.Dataset.from_list(setups.ROWS),
        processing_class=tiny.tokenizer(()),
        **keywords,
    )


def test_arguments_that_planning_has_no_use_for(tmp_path):
    for name in ("data_collator", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"{name}: .*leave it out"):
            build(tmp_path, **{name: lambda *_, **__: None})
    with pytest.raises(ValueError, match="data_collator"):
        PlannerExecutorTrainer(tiny.model(), PlannerExecutorConfig(**setups.settings(tmp_path)), lambda rows: rows)
    with pytest.raises(ValueError, match="needs a PlannerExecutorConfig"):
        PlannerExecutorTrainer(tiny.model(), LoraConfig(), train_dataset=None)


def test_adapters_that_would_leave_the_planner_untrained(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="is wrapped by PEFT and has no planner"):
        build(tmp_path, get_peft_model(tiny.model(), lora))
    planner = PlannerConfig(setups.TYPES)
    with pytest.raises(ValueError, match="would leave the planner untrained"):
        build(tmp_path, get_peft_model(attach_planner(tiny.model(), planner), lora))
    with pytest.raises(ValueError, match="PrefixTuningConfig adds virtual tokens"):
        build(tmp_path, peft_config=PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_models_that_cannot_plan(tmp_path):
    eager = tiny.model()
    eager.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="planning needs 'sdpa' or 'eager'"):
        build(tmp_path, eager)
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "vocab_size": 64,
    }
    torch.manual_seed(0)
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**small, sliding_window=None))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        build(tmp_path, experts)


def test_more_beams_than_plans(tmp_path):
    types = [{"name": "a", "num_concepts": 2, "quota": 1}]
    with pytest.raises(ValueError, match="num_beams=4: there are only 3 plans"):
        setups.trainer(tmp_path, training="hard_em", types=types, num_beams=4)
    setups.trainer(tmp_path, training="hard_em", types=types, num_beams=3, max_steps=1).train()


def test_a_model_with_a_planner_keeps_it_with_a_warning(tmp_path, monkeypatch):
    from trl_ext.common import model_loading as module

    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    planner = PlannerConfig([{"name": "x", "num_concepts": 3, "quota": 2}], "parallel")
    trainer = build(tmp_path, attach_planner(tiny.model(), planner))
    assert backbone_of(trainer.model).planner_config == planner
    assert [text.split("=")[0] for text in said if "keeps it" in text] == [
        "the model was made with types",
        "the model was made with ordering",
    ]


def test_probes_need_a_plan(tmp_path):
    trainer = setups.trainer(tmp_path, use_planner=False)
    with pytest.raises(ValueError, match="use_planner=False: there is no plan"):
        trainer.probe({})
