"""A trainer that is given the path of a model that was trained before."""

import pytest
import torch

from tests import tiny
from unsloth_ext import ThinkingConfig, attach_planner, attach_thinking, backbone_of

from . import setups


def full(folder, attach):
    model = attach(tiny.model())
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("peft", [True, False])
def test_a_thinking_model_keeps_its_modules_and_settings(tmp_path, peft):
    """They were attached anew, at random, when the model came by its name."""
    config = ThinkingConfig(thinking_norm="none", residual_r_min=0.5, residual_r_max=0.6)
    before = full(tmp_path / "full", lambda model: attach_thinking(model, config))
    trainer = setups.hrpo(tmp_path, peft=peft, model=str(tmp_path / "full"))
    backbone = backbone_of(trainer.model)
    assert backbone.thinking_config == config
    ours = {k.replace("modules_to_save.default.", ""): v for k, v in backbone.state_dict().items()}
    theirs = {k: v for k, v in before.model.state_dict().items() if "thinking" in k}
    assert len(theirs) == 6 and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_other_folders_are_refused_by_name(tmp_path):
    full(tmp_path / "planner", attach_planner)
    setups.hrpo(tmp_path).save_model(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"is an adapter: .*FastThinkingModel.from_pretrained"):
        setups.hrpo(tmp_path, model=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="there is no folder"):
        setups.hrpo(tmp_path, model=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"method planner .*PlannerExecutorModel.from_pretrained"):
        setups.hrpo(tmp_path, model=str(tmp_path / "planner"))
