"""A run that is cut off and goes on is the run that was not; what does not fit is named by file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.marks import slow
from trl_ext.common.checkpointing import CheckpointError, last_complete_checkpoint
from trl_ext.planner.monitor_callback import PlannerMonitorCallback

from . import setups


SAVING = {
    "save_strategy": "steps",
    "save_steps": 5,
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
CASES = {
    "soft": {
        "target_length": [2.0, 1.0],
        "eos_weight": 0.1,
        "word_dropout": 0.2,
        "temperature_end": 0.5,
        "length_curriculum": [2, 4],
        "length_curriculum_nll": 4.0,
    },
    "hard_em": {
        "training": "hard_em",
        "e_step_every": 2,
        "num_candidates": 2,
        "adaptive_e_step": True,
        "z_dropout": 0.2,
        "staleness_threshold": 1e-6,
        "length_curriculum": [2, 4],
    },
    "at once": {"ordering": "parallel", "multi_token": True, "target_length": 1.5},
}
UNEQUAL = ("train_", "num_tokens")  # times, and counts that begin anew as SFT's do


def kept(trainer):
    return {name: x.clone() for name, x in trainer.planner_state.state_dict().items()}


@pytest.mark.parametrize("peft", [True, slow(False)])
@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, case, peft):
    """From step 5 of 10, in the second of four epochs: weights, what is kept beside them, and what is logged."""
    whole = setups.trainer(tmp_path, peft, **SAVING, **CASES[case])
    middle = {}
    whole._save_checkpoint = lambda *args, inner=whole._save_checkpoint: (
        middle.setdefault("state", kept(whole)),
        inner(*args),
    )
    whole.train()
    again = setups.trainer(tmp_path, peft, **SAVING, **CASES[case])
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-10"
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    ends, moved = (kept(t) for t in (whole, again))
    assert all(torch.equal(ends[name], moved[name]) for name in ends)
    # Every part went on after the checkpoint, so that losing one would be seen
    parts = {name.split(".")[0] for name in ends if not torch.equal(ends[name], middle["state"][name])}
    assert parts >= {"usage"} | ({"quota"} if "target_length" in CASES[case] else {"schedule", "cache"})
    if case == "hard_em":
        assert ends["cache.known"].all() and len(set(setups.logged(whole, "em/interval"))) > 1
    ours, theirs = (
        [{k: v for k, v in e.items() if not k.startswith(UNEQUAL)} for e in t.state.log_history if e["step"] > 5]
        for t in (whole, again)
    )
    assert ours == theirs
    assert not {file.suffix for file in (tmp_path / "checkpoint-5").iterdir()} & {".bin", ".pt", ".pth", ".pkl"}


@pytest.mark.slow
def test_a_lost_part_would_be_seen(tmp_path, monkeypatch):
    """The test above has teeth: without what is kept, weights come out otherwise."""
    from trl_ext.planner import trainer as module

    for case in ("soft", "hard_em"):
        folder = tmp_path / case
        whole = setups.trainer(folder, **SAVING, **CASES[case])
        whole.train()
        monkeypatch.setattr(module, "load_planner_state", lambda *_: None)
        again = setups.trainer(folder, **SAVING, **CASES[case])
        again.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
        monkeypatch.undo()
        pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_probes_change_nothing_and_resume_with_their_callback(tmp_path):
    """Weights are those of a run without; the callback is introduced to the trainer, also by `add_callback`."""
    plain = setups.trainer(tmp_path / "plain", **SAVING)
    plain.train()
    whole = setups.trainer(tmp_path, callbacks=[PlannerMonitorCallback(every=2)], **SAVING)
    whole.train()
    assert len(setups.logged(whole, "monitor/delta_nll_null")) == 5
    again = setups.trainer(tmp_path, **SAVING)
    again.add_callback(PlannerMonitorCallback(every=2))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert setups.logged(again, "monitor/delta_nll_null") == setups.logged(whole, "monitor/delta_nll_null")
    for other in (whole, again):
        assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))


SHORT = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "training": "hard_em"}
TENSORS, SETTINGS = "planner_state.safetensors", "planner_state.json"


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


WRONG = {
    "no tensors": (rf"{TENSORS} is missing", lambda f: (f / TENSORS).unlink()),
    "no settings": (rf"{SETTINGS} is missing", lambda f: (f / SETTINGS).unlink()),
    "damaged": (rf"{TENSORS} is truncated or damaged", lambda f: (f / TENSORS).write_bytes(b"x")),
    "half": (rf"{SETTINGS} is not complete JSON", lambda f: (f / SETTINGS).write_text('{"types')),
    "less": (
        rf"{SETTINGS} has no 'mode'",
        lambda f: (f / SETTINGS).write_text(
            json.dumps({k: v for k, v in json.loads((f / SETTINGS).read_text()).items() if k != "mode"})
        ),
    ),
    "lost": (r"cache.plans is missing", lambda f: edit(f / TENSORS, lambda t: t.pop("cache.plans"))),
    "no number": (
        r"usage.average_0 holds NaN",
        lambda f: edit(f / TENSORS, lambda t: t.update({"usage.average_0": t["usage.average_0"] * torch.nan})),
    ),
    "short": (
        r"cache.known is \[3\], but this run needs \[24\]",
        lambda f: edit(f / TENSORS, lambda t: t.update({"cache.known": t["cache.known"][:3].clone()})),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_damaged_checkpoints_are_named_by_file(tmp_path, wrong):
    message, spoil = WRONG[wrong]
    setups.trainer(tmp_path, **SHORT).train()
    spoil(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=message) as error:
        setups.trainer(tmp_path, **SHORT).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "checkpoint-2" in str(error.value)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    setups.trainer(tmp_path, **SHORT).train()
    other_rows = [*setups.ROWS[:-1], {"prompt": "9=", "completion": "9"}]
    for changes, message in (
        ({"rows": other_rows}, "rows of another training dataset"),
        ({"rows": setups.ROWS[:-1]}, "rows of another training dataset"),
        ({"mode": "reconstruct"}, "mode='generate', this run 'reconstruct'"),
        ({"training": "soft"}, "training='hard_em', this run 'soft'"),
        ({"ordering": "parallel"}, "ordering='sequential', this run 'parallel'"),
        ({"length_curriculum": [4]}, "curriculum.nll is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            setups.trainer(tmp_path, **{**SHORT, **changes}).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-2")
            )
