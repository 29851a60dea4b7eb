"""The trainer against the paper's algorithm written out, prompt by prompt, with forwards of its own."""

import math

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.marks import slow
from tests.trl_ext.spo import setups
from tests.trl_ext.spo.test_tracker import literal
from trl_ext import SPOConfig
from trl_ext.common.checkpointing import CheckpointError
from trl_ext.spo.trainer import ROW, whitened


def log_probs(model, prompt, completion):
    """Of one completion behind one prompt, without padding, (C,) float64."""
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def watched(trainer):
    """What the trainer is given and makes of it, rollout by rollout, with a copy of the policy at that time."""
    seen, parent = [], trainer._advantages

    def advantages(inputs, output, rewards):
        policy = AutoModelForCausalLM.from_config(
            trainer.model.config
        )  # a copy would call the original's patched forward
        policy.load_state_dict(trainer.model.state_dict())
        made = parent(inputs, output, rewards)
        kept = {k: output[k].clone() for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
        seen.append({"rows": [row[ROW] for row in inputs], "rewards": rewards, "made": made, "policy": policy, **kept})
        return made

    trainer._advantages = advantages
    return seen


def responses(rollout):
    for i in range(len(rollout["rows"])):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        yield prompt, rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        slow({"num_iterations": 2}),
        slow({"rho_mode": "constant"}),
        slow({"initial_value": 0.3}),
    ],
    ids=str,
)
def test_many_steps_are_the_literal_algorithm(tmp_path, changes):
    """30 rollouts of 4 of 12 prompts: D, value and whitened advantage of each; 1e-4 (fp32 log-probs against fp64)."""
    trainer = setups.spo(tmp_path, max_steps=30 * changes.get("num_iterations", 1), learning_rate=3e-4, **changes)
    seen = watched(trainer)
    trainer.train()
    assert len(seen) == 30
    last, visits, rollouts = {}, [], []
    for rollout in seen:
        texts = list(responses(rollout))
        for row, reward in zip(rollout["rows"], rollout["rewards"].tolist(), strict=True):
            divergence = None
            if row in last:
                old_prompt, old_completion, old = last[row]
                now = log_probs(rollout["policy"], old_prompt, old_completion)
                divergence = (now - old).abs().mean().item()
            visits.append((row, reward, divergence))
        for row, (prompt, completion) in zip(rollout["rows"], texts, strict=True):
            last[row] = (prompt, completion, log_probs(rollout["policy"], prompt, completion).detach())
        rollouts.append(rollout["rewards"].double())
    values, rhos, a, b = literal(visits, 12, changes.get("rho_mode", "kl"), first=changes.get("initial_value", 0.5))
    if changes.get("rho_mode") != "constant":
        assert len({round(rho, 3) for rho in rhos}) > 5  # D mattered
    for i, rewards in enumerate(rollouts):
        raw = rewards - torch.tensor(values[4 * i : 4 * i + 4], dtype=torch.float64)
        expected = (raw - raw.mean()) / raw.std()
        assert torch.allclose(seen[i]["made"].double(), expected, atol=1e-4), i
    assert torch.allclose(trainer.tracker.a, torch.tensor(a, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(trainer.tracker.b, torch.tensor(b, dtype=torch.float64), atol=1e-4)


def test_the_loss_is_clipped_by_token_at_its_two_bounds(tmp_path):
    """The mean over all tokens of -min(ratio A, clip(ratio, 0.8, 1.28) A), far from the old policy; loss to 1e-5, gradient
    to 1e-4 of its largest entry. No KL."""
    trainer = setups.spo(tmp_path, num_iterations=2, max_steps=1)
    captured, parent = [], trainer._compute_loss

    def compute_loss(model, inputs):
        captured.append(inputs)
        return parent(model, inputs)

    trainer._compute_loss = compute_loss
    trainer.train()
    inputs, model = captured[0], trainer.model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    ours = parent(model, inputs)
    ours.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    terms, clipped = [], 0
    texts = responses({"rows": range(4), **inputs})
    for i, (prompt, completion) in enumerate(texts):
        old = inputs["old_per_token_logps"][i][: len(completion)].double()
        ratio = (log_probs(model, prompt, completion) - old).exp()
        advantage = inputs["advantages"][i].double()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
        clipped += ((ratio < 0.8) | (ratio > 1.28)).sum()
    assert clipped > 0
    expected = torch.cat(terms).mean()
    expected.backward()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (gradient - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_a_global_tracker_follows_the_rollout_before(tmp_path):
    """One value, one visit a rollout with the mean reward, D from the responses of the rollout before; 1e-4."""
    trainer = setups.spo(tmp_path, value_tracker="global", max_steps=8)
    seen = watched(trainer)
    trainer.train()
    a = b = 4.0
    before = None
    for rollout in seen:
        value = a / (a + b)
        raw = rollout["rewards"].double() - value
        assert torch.allclose(rollout["made"].double(), (raw - raw.mean()) / raw.std(), atol=1e-4)
        rho = 0.9
        if before is not None:
            moved = [(log_probs(rollout["policy"], p, c) - old).abs().mean().item() for p, c, old in before]
            rho = min(max(2 ** (-sum(moved) / len(moved) / 0.06), 0.875), 0.96)
        mean = rollout["rewards"].double().mean().item()
        a, b = rho * a + mean, rho * b + 1 - mean
        before = [(p, c, log_probs(rollout["policy"], p, c).detach()) for p, c in responses(rollout)]
    assert trainer.tracker.a.item() == pytest.approx(a, abs=1e-4) and trainer.tracker.a.shape == (1,)


@pytest.mark.slow
def test_no_prompt_comes_twice_in_a_rollout_and_uncertain_ones_come_more_often(tmp_path):
    def reward(prompts, **_):  # of every other prompt it is certain
        flip = iter([0.0, 1.0] * len(prompts))
        return [1.0 if prompt.count("+") % 2 else next(flip) for prompt in prompts]

    trainer = setups.spo(tmp_path, reward=reward, max_steps=120, rho_mode="constant", learning_rate=0.0)
    seen = watched(trainer)
    trainer.train()
    assert all(len(set(rollout["rows"])) == 4 for rollout in seen)
    later = [row for rollout in seen[60:] for row in rollout["rows"]]
    certain = {i for i, row in enumerate(trainer.train_dataset["prompt"]) if row.count("+") % 2}
    share = sum(row in certain for row in later) / len(later)
    assert len(certain) == 6 and share < 0.42  # half by chance; sqrt(v (1 - v)) + 0.05 tends to 0.05 against 0.55


def test_unscorable_completions_teach_nothing(tmp_path):
    def reward(completions, **_):
        return [None, *(0.25 * i for i in range(1, len(completions)))]

    trainer = setups.spo(tmp_path, reward=reward, max_steps=2)
    seen = watched(trainer)
    trainer.train()
    for rollout in seen:
        assert rollout["made"][0] == 0 and abs(rollout["made"][1:].mean()) < 1e-6
    untouched = seen[0]["rows"][0]
    assert untouched in seen[1]["rows"] or trainer.tracker.a[untouched] == 4


def test_whitening():
    values = torch.tensor([1.0, math.nan, 3.0, 2.0])
    assert torch.allclose(whitened(values), torch.tensor([-1.0, 0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.equal(whitened(torch.tensor([0.5, 0.5, 0.5])), torch.zeros(3))
    assert torch.equal(whitened(torch.tensor([0.7, math.nan])), torch.zeros(2))


def test_rewards_outside_are_refused_before_an_optimizer_step(tmp_path):
    trainer = setups.spo(tmp_path, reward=lambda completions, **_: [2.0] * len(completions))
    before = setups.parameters(trainer)
    with pytest.raises(ValueError, match="a reward is 2"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in setups.parameters(trainer).items())


def test_what_is_logged(tmp_path):
    trainer = setups.spo(tmp_path, max_steps=4, peft=True)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"spo/value", "spo/rho", "reward", "completions/mean_length"} <= logs[-1].keys()
    assert "spo/divergence" in logs[-1] and "frac_reward_zero_std" not in logs[-1]
    assert len(trainer._logs["advantages"]) == 4 and any(trainer._logs["advantages"])


def test_evaluation_moves_no_tracker(tmp_path):
    trainer = setups.spo(tmp_path, max_steps=1)
    trainer.eval_dataset = setups.prompts(4)
    a = trainer.tracker.a.clone()
    assert "eval_reward" in trainer.evaluate()
    assert torch.equal(a, trainer.tracker.a)


@pytest.mark.parametrize(
    "changes",
    [
        slow({}),
        slow({"num_iterations": 2}),
        {"gradient_accumulation_steps": 2},
        slow({"shuffle_dataset": False}),
    ],
    ids=str,
)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, changes):
    """Inside an epoch, at its end, inside a rollout's two passes, in the second epoch (3 rollouts each)."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "lr_scheduler_type": "cosine", **changes}
    saving |= {"per_device_train_batch_size": 2} if "gradient_accumulation_steps" in changes else {}
    whole = setups.spo(tmp_path, **saving)
    whole.train()
    for step in (1, 3, 5):
        torch.manual_seed(1234)
        resumed = setups.spo(tmp_path, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        a, b = setups.parameters(whole), setups.parameters(resumed)
        assert all(torch.equal(a[name], b[name]) for name in a), step
        assert torch.equal(whole.tracker.a, resumed.tracker.a) and torch.equal(whole.tracker.b, resumed.tracker.b)
        assert whole._memory.keys() == resumed._memory.keys()
        for row, kept in whole._memory.items():
            assert torch.equal(kept.log_probs, resumed._memory[row].log_probs)


def test_checkpoints_of_others_are_refused(tmp_path):
    setups.spo(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"

    def resume(**changes):
        setups.spo(tmp_path, max_steps=2, **changes).train(resume_from_checkpoint=str(folder))

    with pytest.raises(CheckpointError, match="value_tracker='prompt', this run 'global'"):
        resume(value_tracker="global")
    with pytest.raises(CheckpointError, match="rows of another training dataset"):
        resume(dataset=setups.prompts(13).select(range(1, 13)))
    with pytest.raises(CheckpointError, match="shuffle_dataset"):
        resume(shuffle_dataset=False)
    whole = load_file(folder / "spo_state.safetensors")
    save_file({**whole, "tracker.a": whole["tracker.a"] * torch.nan}, folder / "spo_state.safetensors")
    with pytest.raises(CheckpointError, match=r"spo_state\.safetensors: tracker\.a holds NaN"):
        resume()
    save_file({**whole, "memory.log_probs": whole["memory.log_probs"] * torch.nan}, folder / "spo_state.safetensors")
    resume()  # a tool's tokens have none
    (folder / "spo_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"spo_state\.json is missing"):
        resume()


def test_a_saved_policy_loads_in_stock_transformers(tmp_path):
    trainer = setups.spo(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = torch.arange(3, 11)[None]
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_generations": 2}, "num_generations=2"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1"),
        ({"value_tracker": "row"}, "value_tracker='row'"),
        ({"rho_mode": "x"}, "rho_mode='x'"),
        ({"sampling_epsilon": 0}, "sampling_epsilon=0"),
        ({"D_half": 0}, "D_half=0"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        setups.arguments(SPOConfig, tmp_path, **{"num_generations": 1, **changes})


def test_bad_datasets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"3 rows, but a rollout needs 4"):
        setups.spo(tmp_path, dataset=setups.prompts(3))
    with pytest.raises(ValueError, match="IterableDataset"):
        setups.spo(tmp_path, dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "1="}])))


@pytest.mark.slow
def test_it_learns(tmp_path):
    """The share of a character goes from a few per cent to more than a third in 60 rollouts of 16."""

    def reward(completions, **_):
        return [text.count("1") / max(len(text), 1) for text in completions]

    trainer = setups.spo(
        tmp_path,
        reward=reward,
        dataset=setups.prompts(24),
        per_device_train_batch_size=16,
        max_steps=60,
        learning_rate=3e-3,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[:5]) / 5 < 0.1 and sum(rewards[-5:]) / 5 > 0.35
