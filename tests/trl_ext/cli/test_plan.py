"""The calculator, against what small models really take."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.processes import ROOT, fresh
from trl_ext.cli import plan


PLAIN = {"checkpointing": False, "mixed": False}
SHAPE = {"prompt": 8, "completion": 24, "rows": 2, "generated": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(plan, "SIZES", {**plan.SIZES, "small": (64, 128, 3, 4, 2, 512, True)})


def run(**changes):
    return plan.Run(
        **{"model": "small", "engine": "one", "gpus": 1, "checkpointing": False, "mixed": False, **SHAPE, **changes}
    )


@pytest.mark.parametrize("size, published", [("0.5b", 0.494), ("1.5b", 1.544), ("7b", 7.616), ("72b", 72.7)])
def test_the_sizes_have_the_published_numbers_of_parameters(size, published):
    count, trained, _ = plan.parameters(plan.config_of(size), run())
    assert count == trained and count / 1e9 == pytest.approx(published, rel=1e-3)


def test_weights_gradients_and_optimizer_are_those_of_a_step():
    """Exact."""
    model = AutoModelForCausalLM.from_config(plan.config_of("small"), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
    found = plan.memory(run())
    assert found["weights"] == size(model.parameters())
    assert found["gradients"] == size(p.grad for p in model.parameters())
    states = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert found["optimizer"] == size(states)


def test_activations_are_those_that_a_forward_saves():
    """Without the head's, in float32; 2% for what layers share."""
    model = AutoModelForCausalLM.from_config(plan.config_of("small"), dtype=torch.float32).train()
    own, saved = {p.data_ptr() for p in model.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = (
                x.untyped_storage().nbytes(),
                x,
            )  # kept, so that no address is used twice
        return x

    ids = torch.zeros(2, 32, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # padded, or transformers would leave the mask out
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    inside, outside = plan.activations(plan.config_of("small"), run(), 32)
    assert inside + outside == pytest.approx(sum(size for size, _ in saved.values()), rel=0.02)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_more_gpus_take_less_of_what_is_sharded(engine):
    few, many = (plan.memory(run(engine=engine, gpus=n)) for n in (2, 8))
    for name in ("weights", "optimizer"):
        assert few[name] == pytest.approx(4 * many[name])
    assert few["activations"] == many["activations"]


@pytest.mark.parametrize("method", plan.METHODS)
def test_every_method_has_a_plan(method):
    found = plan.memory(run(method=method, engine="fsdp2", gpus=4, teacher="small"))
    assert all(size >= 0 for size in found.values()) and found["peak of training"] > found["weights"]
    assert (found["peak of rollouts"] > 0) == (method in plan.SAMPLES)
    assert (found["teacher"] > 0) == (method in plan.TAUGHT) and (found["critic"] > 0) == (method == "ppo")


def test_lora_and_checkpointing_take_less():
    whole = plan.memory(run())
    lora = plan.memory(run(lora_r=4))
    assert lora["optimizer"] < whole["optimizer"] / 4 and lora["weights"] > whole["weights"]
    assert plan.memory(run(checkpointing=True))["activations"] < whole["activations"] / 1.5


def test_ddp_sends_twice_its_gradients_and_one_process_nothing():
    config = plan.config_of("small")
    count, _, _ = plan.parameters(config, run())
    assert plan.traffic(run(engine="ddp", gpus=4)) == {
        "gradients": pytest.approx(2 * 4 * count * 3 / 4),
        "weights": 0,
        "weights for a rollout": 0,
        "rollout states": 0,
    }
    assert not any(plan.traffic(run()).values())
    assert all(
        seconds >= 0 for seconds in plan.times(dataclasses.replace(run(), gpus=16, engine="fsdp2"), "h100").values()
    )


def test_a_server_takes_the_rollouts():
    alone, served = (run(gpus=3, engine="fsdp2", vllm_gpus=gpus) for gpus in (0, 1))
    count, _, _ = plan.parameters(plan.config_of("small"), run())
    without, found = plan.memory(alone), plan.memory(served)
    assert found["KV cache"] == 0 and found["peak of rollouts"] < without["peak of rollouts"]
    assert found["peak of training"] == without["peak of training"]
    # keys and values of 3 layers x 2 heads of 16, for 3 processes x 4 rows of 32 tokens, in float32
    assert plan.server_memory(served) == {"weights": 2 * count, "KV cache": 2 * 3 * 2 * 16 * 12 * 32 * 4}
    states = plan.traffic(served)["rollout states"]
    assert states == 12 * 24 * 64 * 4
    assert plan.times(served, "h100")["rollout"] > plan.times(alone, "h100")["rollout"]  # one GPU for the rows of three


def test_the_command(monkeypatch):
    done = fresh("-m", "trl_ext", "plan", "--model", "0.5b", "--gpus", "2", "--engine", "zero2", "--method", "kava")
    assert done.returncode == 0, done.stderr
    assert "kava of 0.5b on 2 x h100 with zero2" in done.stdout and "fits into a h100" in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--engine", "one", "--gpus", "2"], "--engine one --gpus 2: one process has one GPU; choose another engine"),
        (["--method", "kava", "--vllm_gpus", "8"], "--vllm_gpus 8: only hrpo, spo, ppo have rollouts; leave it out"),
        (["--rows", "0"], "--rows 0: must be at least 1"),
        (["--modell", "7b"], "--modell: there is no such flag, did you mean --model?"),
    ],
)
def test_wrong_flags(flags, said):
    with pytest.raises(ValueError) as error:
        plan.main(flags)
    assert said.split(",")[0] in str(error.value)


def test_the_page_shows_what_the_command_prints(capsys):
    page = (ROOT / "docs" / "scale.md").read_text()
    command = page.split("latent-reasoning plan ")[1].split("\n")[0]
    assert plan.main(command.split()) == 0
    assert capsys.readouterr().out.strip() in page
