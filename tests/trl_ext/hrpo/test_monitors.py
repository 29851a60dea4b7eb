"""The thinking projection's monitor, as a user would add it."""

import re

import pytest
import torch
from transformers import TrainerCallback

from trl_ext import ThinkingProjectionMonitor
from trl_ext.hrpo.method import METHOD
from trl_ext.hrpo.monitors import projection_weight
from unsloth_ext import backbone_of

from . import setups


@pytest.mark.parametrize("peft", [True, False])
def test_it_prints_what_the_trainer_logs(tmp_path, capsys, peft):
    """Mean absolute change and gradient norm, to the three digits it prints; the change against the plain figure, 1e-6."""
    trainer = setups.hrpo(tmp_path, peft=peft, max_steps=4, max_grad_norm=1e9)
    weight = projection_weight(backbone_of(trainer.model))
    start = weight.detach().clone()
    trainer.add_callback(ThinkingProjectionMonitor(every=2))
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "thinking_projection" in line]
    found = [re.fullmatch(r"step (\d): thinking_projection: mean change (\S+), gradient norm (\S+)", x) for x in lines]
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "reward" in entry}
    assert [int(match[1]) for match in found] == [2, 4]
    for match in found:
        log = logs[int(match[1])]
        assert (
            float(match[2]) == pytest.approx(log["thinking/projection_mean_change"], rel=1e-3) and float(match[2]) > 0
        )
        assert float(match[3]) == pytest.approx(log["thinking/projection_grad_norm"], rel=1e-3) and float(match[3]) > 0
    moved = (weight.detach() - start).abs().mean().item()
    assert logs[4]["thinking/projection_mean_change"] == pytest.approx(moved, rel=1e-6)
    assert logs[2]["thinking/projection_mean_change"] < moved


class Own(TrainerCallback):
    """As one would write it: the weight's path on the model that the trainer holds."""

    def on_train_begin(self, args, state, control, model, **_):
        self.start = model.model.model.thinking_projection.weight.detach().clone()

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.norm = model.model.model.thinking_projection.weight.grad.norm()

    def on_step_end(self, args, state, control, model, **_):
        change = (model.model.model.thinking_projection.weight.detach() - self.start).abs().mean()
        print(f"mine {state.global_step}: mean change {change:.3e}, gradient norm {self.norm:.3e}")


def test_the_monitor_and_ones_own_callback_say_the_same(tmp_path, capsys):
    """At the shipped max_grad_norm, which clips the projection's gradient."""
    trainer = setups.hrpo(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer.add_callback(ThinkingProjectionMonitor(every=1))
    trainer.add_callback(Own())
    trainer.train()
    out = capsys.readouterr().out
    ours, own = (
        re.findall(rf"^{start}: (mean .*)", out, re.M) for start in (r"step \d: thinking_projection", r"mine \d")
    )
    assert ours == own and len(ours) == 2
    for line, log in zip(ours, trainer.state.log_history):
        before = log["thinking/projection_grad_norm"]
        assert float(line.split()[-1]) == pytest.approx(trainer.args.max_grad_norm, rel=1e-3) and before > 1


def test_a_frozen_projection_has_no_gradient(tmp_path, capsys):
    trainer = setups.hrpo(tmp_path, max_steps=1, lr_thinking_projection=0.0)
    trainer.add_callback(ThinkingProjectionMonitor(every=1))
    trainer.train()
    assert "step 1: thinking_projection: mean change 0.000e+00, No gradient!" in capsys.readouterr().out


def test_a_wrong_interval_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        ThinkingProjectionMonitor(every=0)


def test_the_curves_show_it():
    """What the recipe draws is logged under these names."""
    assert {"thinking/projection_mean_change", "thinking/projection_grad_norm"} <= {name for name, _ in METHOD.curves}


@pytest.mark.parametrize("ends", ["eos", "delimiter", "neither"])
def test_the_share_of_completions_with_the_delimiter(tmp_path, ends):
    """Of rows that end at EOS, contain the delimiter, or do neither, those with it count."""
    trainer = setups.hrpo(tmp_path, max_steps=1)
    tokenizer, (eos,) = trainer.processing_class, trainer.eos_token_ids
    token = {
        "eos": eos,
        "delimiter": tokenizer.convert_tokens_to_ids("#"),
        "neither": tokenizer.convert_tokens_to_ids("a"),
    }
    head = trainer.model.get_output_embeddings()

    def only(module, args, logits):
        return torch.full_like(logits, -100).index_fill(-1, torch.tensor([token[ends]]), 0.0)

    hook = head.register_forward_hook(only)
    trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
    hook.remove()
    assert trainer._metrics["train"]["completions/delimiter_rate"] == [float(ends == "delimiter")]
