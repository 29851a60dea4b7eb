"""Trainers in two processes on each engine, with TRL's own files, against DDP; and DDP against one process."""

import json

import pytest
import torch

from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from trl_ext.common.engines import REFUSED

from . import worker
from .launch import launch


# float32, sums in another order, through some steps of AdamW of 1e-3 each
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
# DeepSpeed clips the gradients of all roles together, which changes the steps of the gates
ONE_BOUND = {"rtol": 1e-3, "atol": 3e-4}
# Squares over sigma^2 round more, and AdamW makes whole steps of small gradients
SQUARES = {"rtol": 1e-3, "atol": 3e-4}
FAST = [("hrpo", "fsdp2"), ("planner", "fsdp2")]  # the others run with `make test-engines`
# Cases that engines refuse
METHODS = {
    "latent, LoRA": "Latent distillation with an adapter",
    "latent, sequential, written": "Latent distillation with w_step_decoder",
    "latent, jacobi, written": "Latent distillation with w_step_decoder",
    "latent grpo, LoRA": "Latent distillation with an adapter",
    "planner": "Planner-executor",
    "planner, LoRA": "Planner-executor",
}
RUN = [
    (case, engine)
    for case in worker.CASES
    if case != "ppo, target_kl"  # see below
    for engine in ("fsdp2", "zero2", "zero3")
    if engine not in REFUSED.get(METHODS.get(case, ""), {})
]
RUN += [(case, "zero1") for case in ("hrpo", "latent, sequential", "kv, default", "concept, stable", "planner", "ppo")]
WORDLESS = ("latent, LoRA",)  # this model writes special tokens only
FSDP1 = ("stock sft", "stock grpo", "logits", "reasoning", "kv, default", "concept, literal", "spo", "ppo")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The folder in which a case ran on DDP."""
    folders = {}

    def run(case):
        if case not in folders:
            folders[case] = folder = tmp_path_factory.mktemp("case")
            hrpo.base_folder(folder)
            distill.teacher().save_pretrained(folder / "teacher")
            kv.teacher().save_pretrained(folder / "kv_teacher")
            launch("ddp", case, folder)
        return folders[case]

    return run


def found(folder, engine, processes=2):
    return [json.loads((folder / f"{engine}{rank}.json").read_text()) for rank in range(processes)]


def check_equal(folder, one, other, close):
    logs = [found(folder, engine, 1)[0]["logs"] for engine in (one, other)]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    check_weights(folder, one, other, close)


def check_weights(folder, one, other, close):
    weights, ours = (torch.load(folder / f"{engine}0.pt") for engine in (one, other))
    assert weights.keys() == ours.keys()
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


def against_ddp(folder, case, engine):
    launch(engine, case, folder)
    close = ONE_BOUND if case.startswith("hrpo") and engine.startswith("zero") else CLOSE
    check_equal(folder, "ddp", engine, close)
    theirs, ours = found(folder, "ddp"), found(folder, engine)
    lengths = [rank["lengths"] for rank in ours]
    assert lengths == [rank["lengths"] for rank in theirs]
    assert lengths[0] == lengths[1] == [] or lengths[0] != lengths[1]  # no process waits for the longest completion
    texts = [rank["texts"] for rank in theirs + ours]
    assert texts == 4 * texts[:1] and (any(texts[0]) or not worker.writes(case) or case in WORDLESS)


@pytest.mark.parametrize("case, engine", FAST)
def test_the_weights_are_those_of_ddp(ddp, case, engine):
    against_ddp(ddp(case), case, engine)


@pytest.mark.engines
@pytest.mark.parametrize("case, engine", [cell for cell in RUN if cell not in FAST])
def test_every_case_on_every_engine(ddp, case, engine):
    against_ddp(ddp(case), case, engine)


@pytest.mark.engines
@pytest.mark.parametrize("case", FSDP1)
def test_fsdp1_has_ddps_losses(ddp, case):
    folder = ddp(case)
    launch("fsdp1", case, folder)
    theirs, ours = (found(folder, engine, 1)[0]["logs"] for engine in ("ddp", "fsdp1"))
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-4, abs=1e-5)


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize(
    "case",
    [
        "hrpo",
        "hrpo, soft_embedding, soft_bptt",
        "latent, sequential",
        "latent, LoRA",
        "latent, half",
        "latent grpo",
        "kv, default",
        "concept, fixed",
        "planner",
        "ppo",
    ],
)
def test_mixed_precision(ddp, case, engine):
    """bf16: the first loss is that of DDP within its rounding, and training goes on to its end."""
    if engine in REFUSED.get(METHODS.get(case, ""), {}):
        return
    folder, half = ddp(case), {"settings": {"bf16": True}}
    launch("ddp", case, folder, **half, name="ddp16")
    launch(engine, case, folder, **half, name=f"{engine}16")
    theirs, ours = (found(folder, name, 1)[0]["logs"] for name in ("ddp16", f"{engine}16"))
    assert len(ours) == len(theirs) and ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=0.02)
    assert ours[-1]["grad_norm"] == pytest.approx(theirs[-1]["grad_norm"], rel=0.3)


@pytest.mark.parametrize(
    "case",
    [
        "hrpo",
        *(
            pytest.param(case, marks=pytest.mark.engines)
            for case in ("hrpo, LoRA", "hrpo, soft_gaussian", "hrpo, soft_gumbel")
        ),
    ],
)
def test_two_processes_are_one(ddp, case):
    """Rollout, advantages, loss and each weight, if each row draws the same. tests/trl_ext has the other trainers."""
    folder = ddp(case)
    for engine in ("one", "ddp"):
        launch(engine, case, folder, alike=True, name=f"alike {engine}")
    assert all(entry["loss"] and entry["grad_norm"] > 0.01 for entry in found(folder, "alike ddp")[0]["logs"])
    check_equal(folder, "alike one", "alike ddp", SQUARES if case == "hrpo, soft_gaussian" else CLOSE)


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_target_kl_drops_the_same_steps(ddp, engine):
    """DeepSpeed takes its step within the backward, so the decision comes before. ZeRO-3 logs an old norm then."""
    folder = ddp("ppo, target_kl")
    launch(engine, "ppo, target_kl", folder)
    theirs, ours = (found(folder, name)[0]["logs"] for name in ("ddp", engine))
    stopped = [entry["ppo/stopped"] for entry in theirs]
    assert stopped == [0, 1, 1, 1] * 2 == [entry["ppo/stopped"] for entry in ours]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-4, abs=1e-5)
    check_weights(folder, "ddp", engine, CLOSE)


PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "factor": 0.3},
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 5,
}


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_projection_follows_a_schedule_that_follows_a_metric(ddp, engine):
    folder = ddp("kv, default")
    for name in ("ddp", engine):
        launch(name, "kv, default", folder, settings=PLATEAU, name=f"{name} on a plateau")
    check_equal(folder, "ddp on a plateau", f"{engine} on a plateau", CLOSE)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "learning_rate": 0.1,
}


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("case", ["latent, sequential", "logits, LoRA"])
def test_the_best_model_is_loaded_at_the_end(ddp, case, engine):
    """It is that of an early step: later ones are too long."""
    folder = ddp(case)
    for name in ("ddp", engine):
        launch(name, case, folder, settings={**BEST, "output_dir": f"{folder}/{name}"}, name=f"best of {name}")
    check_equal(folder, "best of ddp", f"best of {engine}", CLOSE)


def test_weights_of_two_dtypes_are_refused_by_name(ddp):
    """Small modules stay in float32 beside weights in bfloat16. In mixed precision accelerate trains all in float32."""
    with pytest.raises(
        AssertionError, match=r"embed_tokens.weight is torch.bfloat16 and model.latent_projection.1.weight"
    ):
        launch("fsdp2", "latent, half", ddp("latent, sequential"))
