"""Facts 6 and 7: resume = uninterrupted, stage 2 = stage 1 resumed at other rates; and checkpoints that must be refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.marks import slow
from trl_ext.common.checkpointing import CheckpointError, last_complete_checkpoint

from . import setups


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 1}


def checkpoint(tmp_path, step):
    return str(tmp_path / "out" / f"checkpoint-{step}")


@pytest.mark.parametrize(
    "changes",
    [
        slow({}),
        {"num_iterations": 2},  # step 3 lies inside a generation cycle
        slow({"steps_per_generation": 2, "gradient_accumulation_steps": 1}),
        {"gradient_accumulation_steps": 2, "beta": 0.05},
        slow({"recompute": "two_pass", "thinking_source": "soft_embedding"}),
        slow({"peft": False}),
    ],
    ids=str,
)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, changes):
    whole = setups.hrpo(tmp_path, **SAVING, **changes)
    whole.train()
    for step in (1, 3):
        torch.manual_seed(1234)  # whatever the process did before must not matter
        resumed = setups.hrpo(tmp_path, **SAVING, **changes)
        resumed.train(resume_from_checkpoint=checkpoint(tmp_path, step))
        a, b = setups.parameters(whole), setups.parameters(resumed)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert setups.losses(whole)[step:] == setups.losses(resumed)[step:]


def test_rollouts_of_older_checkpoints_resume(tmp_path):
    """Their hidden states are called "thinking_hidden"."""
    changes = {**SAVING, "num_iterations": 2}
    whole = setups.hrpo(tmp_path, **changes)
    whole.train()
    file = tmp_path / "out" / "checkpoint-3" / "rollout_0.safetensors"
    tensors = load_file(file)
    older = {name.replace("hidden_states", "thinking_hidden"): tensor for name, tensor in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, file)
    resumed = setups.hrpo(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 3))
    assert setups.losses(whole)[3:] == setups.losses(resumed)[3:]


def test_stage_two_trains_the_projection_at_its_own_rate(tmp_path):
    """Fact 6. Stage 1 with rate 0, stage 2 resumed with 5e-5: the scheduler's position and LoRA's state go on, the
    projection starts fresh at 5e-5 times the schedule's factor, and the rates of the command line win everywhere."""
    stage_one = setups.hrpo(tmp_path, lr_thinking_projection=0.0, **{**SAVING, "max_steps": 3})
    stage_one.train()
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "optimizer.safetensors")
    assert not any("thinking_projection" in name for name in saved)
    stage_two = setups.hrpo(tmp_path, lr_thinking_projection=5e-5, lr_residual_gate=7e-4, **{**SAVING, "max_steps": 8})
    seen = []

    from transformers import TrainerCallback

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
            factor = lr_scheduler.lr_lambdas[0](state.global_step)
            steps = {
                name: int(stage_two._torch_optimizer().state.get(p, {}).get("step", 0))
                for name, p in stage_two.model.named_parameters()
                if "thinking_projection" in name or "q_proj.lora_A" in name
            }
            seen.append((state.global_step, factor, {g["role"]: g["lr"] for g in optimizer.param_groups}, steps))

    stage_two.add_callback(Rates())
    before = setups.parameters(stage_two)
    stage_two.train(resume_from_checkpoint=checkpoint(tmp_path, 3))
    assert [step for step, *_ in seen] == [3, 4, 5, 6, 7]
    for _, factor, rates, _ in seen:
        assert rates["thinking_projection"] == pytest.approx(5e-5 * factor, rel=1e-9)
        assert rates["thinking_residual_gate"] == pytest.approx(7e-4 * factor, rel=1e-9)
        assert rates["policy"] == pytest.approx(1e-3 * factor, rel=1e-9)
    first = seen[0][3]
    assert all(step == 0 for name, step in first.items() if "thinking_projection" in name)
    assert all(step == 3 for name, step in first.items() if "lora_A" in name)
    after = setups.parameters(stage_two)
    moved = [n for n in after if "thinking_projection.modules_to_save" in n and not torch.equal(before[n], after[n])]
    assert moved


def test_a_checkpoint_holds_no_pickle(tmp_path):
    trainer = setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    kinds = {file.suffix for folder in ("out/checkpoint-1", "final") for file in (tmp_path / folder).iterdir()}
    assert kinds <= {".safetensors", ".json", ".md", ".jinja"}
    args = json.loads((tmp_path / "final" / "training_args.json").read_text())
    assert args["recompute"] == "rollout"


def test_pickles_are_read_only_when_asked_for_by_name(tmp_path):
    import trl

    args = setups.arguments(trl.GRPOConfig, tmp_path / "stock", **{**SAVING, "max_steps": 1})
    trl.GRPOTrainer(
        setups.base_folder(tmp_path),
        setups.reward_digits,
        args,
        train_dataset=setups.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=setups.lora(),
    ).train()
    stock = str(tmp_path / "stock" / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt.*allow_pickle_checkpoint"):
        setups.hrpo(tmp_path, thinking=False, **SAVING).train(resume_from_checkpoint=stock)
    trainer = setups.hrpo(tmp_path, thinking=False, allow_pickle_checkpoint=True, **{**SAVING, "max_steps": 2})
    trainer.train(resume_from_checkpoint=stock)
    assert trainer.state.global_step == 2


def _cut(file, keep=0.5):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


FILES = [
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
    "scheduler.json",
    "optimizer.json",
    "rng_state_0.json",
    "rng_state_0.safetensors",
    "rollout_0.json",
    "rollout_0.safetensors",
]


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(tmp_path, name):
    setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1}).train()
    folder = tmp_path / "out" / "checkpoint-1"
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        setups.hrpo(tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))


def test_a_file_that_holds_something_else_is_named(tmp_path):
    setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1}).train()
    folder = tmp_path / "out" / "checkpoint-1"
    for name, key in (("scheduler.json", "last_epoch"), ("trainer_state.json", "global_step")):
        whole = (folder / name).read_text()
        for text in ("{}", "[]"):
            (folder / name).write_text(text)
            with pytest.raises(CheckpointError, match=f"{name} has no '{key}'"):
                setups.hrpo(tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))
        (folder / name).write_text(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, name):
    setups.hrpo(tmp_path, **{**SAVING, "max_steps": 2}).train()
    folder = tmp_path / "out" / "checkpoint-2"
    _cut(folder / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        setups.hrpo(tmp_path, **SAVING).train(resume_from_checkpoint=str(folder))
    assert last_complete_checkpoint(tmp_path / "out").name == "checkpoint-1"
    trainer = setups.hrpo(tmp_path, **{**SAVING, "max_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_an_unfinished_checkpoint_never_hides_the_one_before(tmp_path):
    setups.hrpo(tmp_path, **{**SAVING, "max_steps": 2}).train()
    (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").unlink()
    (tmp_path / "out" / "checkpoint-9").mkdir()
    assert last_complete_checkpoint(tmp_path / "out").name == "checkpoint-1"


def test_overwriting_a_whole_checkpoint_first_marks_it_unfinished(tmp_path, monkeypatch):
    trainer = setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1})
    trainer.train()
    again = setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1})
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda _: 1 / 0)  # dies half-way
    with pytest.raises(ZeroDivisionError):
        again.train()
    assert last_complete_checkpoint(tmp_path / "out") is None


def test_checkpoints_of_other_models_are_refused(tmp_path):
    setups.hrpo(tmp_path, **{**SAVING, "max_steps": 1}).train()
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny.config("qwen3")
    config.hidden_size = 48
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CheckpointError, match="another model"):
        setups.hrpo(tmp_path, model=other, **SAVING).train(resume_from_checkpoint=checkpoint(tmp_path, 1))
    with pytest.raises(CheckpointError, match="no such folder"):
        setups.hrpo(tmp_path, **SAVING).train(resume_from_checkpoint=checkpoint(tmp_path, 77))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        setups.hrpo(tmp_path / "elsewhere", model=tiny.model(std=0.1)).train(resume_from_checkpoint=True)


def test_an_adapter_without_gates_is_refused(tmp_path):
    plain = setups.hrpo(tmp_path, thinking=False, **{**SAVING, "max_steps": 1})
    plain.train()
    with pytest.raises(CheckpointError, match="without thinking modules"):
        setups.hrpo(tmp_path, **SAVING).train(resume_from_checkpoint=checkpoint(tmp_path, 1))
