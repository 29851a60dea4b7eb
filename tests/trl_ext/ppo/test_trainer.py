"""Steps against PPO written out, early stop, saving, PEFT, refusals, and that it learns."""

import copy
import functools

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, TrainerCallback

from tests import tiny
from tests.marks import slow
from trl_ext.ppo.critic import critic_of

from . import reference, setups
from .test_critic import loud


def row_of(batch, i, reward):
    """A row of a batch as lists without padding."""
    taken = {name: batch[name][i] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    prompt = taken["prompt_ids"][taken["prompt_mask"] == 1].tolist()
    completion = taken["completion_ids"][taken["completion_mask"] == 1].tolist()
    own = batch["tool_mask"][i].tolist() if "tool_mask" in batch else [1] * len(completion)
    text = tiny.tokenizer().decode(completion, skip_special_tokens=True)
    return {"prompt": prompt, "completion": completion, "own": own[: len(completion)], "reward": reward([text])[0]}


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Steps(TrainerCallback):
    """Compares each step's gradients with the reference's, and keeps how far those of the tutorial's errors are."""

    def __init__(self, trainer, reward):
        self.trainer, self.reward, self.base = trainer, reward, None
        self.differences, self.losses, self.divergences, self.tutorial = [], [], [], {}

    def models(self):
        policy = AutoModelForCausalLM.from_config(self.trainer.model.config)  # a copy would call the trainer's forward
        policy.load_state_dict(self.trainer.model.state_dict())
        return [m.double().eval() for m in (policy, copy.deepcopy(self.trainer.critic))]

    def on_step_begin(self, *_, **__):
        trainer = self.trainer
        self.first = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0
        if self.first:
            self.sampled = self.models()
            self.base = self.base or self.sampled[0]

    def on_pre_optimizer_step(self, args, *_, **__):
        trainer = self.trainer
        batches = trainer._buffered_inputs
        if self.first:
            self.rows = [[row_of(b, i, self.reward) for i in range(len(b["prompt_ids"]))] for b in batches]
            reference.prepare([row for rows in self.rows for row in rows], *self.sampled, self.base, args)
        places = range(trainer._step - args.gradient_accumulation_steps, trainer._step)
        rows = [row for i in places for row in self.rows[i % len(batches)]]
        tokens = sum(sum(row["own"]) for rows in self.rows for row in rows) / len(batches) * len(places)
        models = self.models()
        found = [gradient(model).double() for model in (trainer.model, trainer.critic)]
        for errors in ({}, {"ratio": "sequence"}, {"kl": "k1"}, {"value": "end"}):
            loss, far = reference.loss(rows, *models, args, tokens, **errors)
            for model in models:
                model.zero_grad()
            loss.backward()
            wanted = [gradient(model) for model in models]
            difference = max(((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted))
            if errors:
                self.tutorial.setdefault(str(errors), []).append(difference)
            else:
                self.differences.append(difference)
                self.divergences.append(far)
                self.losses.append(loss.item())


def some_unknown(completions, **_):
    """No reward for completions with a 2 or a 5."""
    return [None if set(text) & set("25") else r for text, r in zip(completions, setups.reward_digits(completions))]


CASES = {
    "one": {"num_iterations": 3},
    "plain KL": {"use_bias_correction_kl": False},
    "accumulation": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "gae_lambda": 0.7, "gamma": 0.9},
    "groups": {"num_generations": 2, "vf_coef": 2.0, "cliprange_value": 0.02, "num_iterations": 3},
    "unknown": {"reward": some_unknown},
    "tools": {"rollout_func": functools.partial(setups.rollouts, env_mask=True)},
}


IN_SHORT = ("groups",)


@pytest.mark.parametrize("case", [c if c in IN_SHORT else slow(c) for c in CASES])
def test_every_step_is_ppo_written_out(tmp_path, case):
    """Gradients of policy and of critic to 1e-4 of their norms, losses and divergence to 1e-4; the tutorial's errors
    (sequence ratio, k1, value read at the end) give others."""
    given = {"max_grad_norm": 0.0, "beta": 0.1, "learning_rate": 3e-3, "weight_decay": 0.1, **CASES[case]}
    reward = given.get("reward", setups.reward_digits)
    critic = loud(AutoModelForTokenClassification.from_pretrained(setups.base_folder(tmp_path), num_labels=1))
    trainer = setups.ppo(tmp_path, critic_model=critic, max_steps=6, **given)
    steps = Steps(trainer, reward)
    trainer.add_callback(steps)
    trainer.train()
    assert len(steps.differences) == 6 and max(steps.differences) <= 1e-4
    assert setups.logged(trainer, "ppo/approx_kl") == pytest.approx(steps.divergences, rel=1e-4, abs=1e-9)
    assert setups.losses(trainer) == pytest.approx(steps.losses, rel=1e-4, abs=1e-5)
    assert max(steps.divergences) > 1e-4 and sum(setups.logged(trainer, "clip_ratio/region_mean")) > 0
    assert all(max(far) > 0.02 for far in steps.tutorial.values()), steps.tutorial
    if case == "unknown":
        assert any(row["reward"] is None for rows in steps.rows for row in rows)


def test_advantages_are_white_over_the_rollout(tmp_path):
    """Mean 0 and standard deviation 1 of all tokens, to 1e-4; 0 on padding."""
    trainer = setups.ppo(tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    batches = trainer._buffered_inputs
    mask = torch.cat([b["completion_mask"] for b in batches])
    advantages = torch.cat([b["advantages"] for b in batches])
    assert mask.sum() < mask.numel() and not advantages[mask == 0].any()
    assert advantages[mask == 1].mean().item() == pytest.approx(0, abs=1e-4)
    assert advantages[mask == 1].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    logged = ((advantages * mask).sum(1) / mask.sum(1)).tolist()  # per completion, in another order
    assert sorted(trainer._logs["advantages"]) == pytest.approx(sorted(logged), abs=1e-6)


@pytest.mark.parametrize("corrected", [True, False])
def test_k1_has_no_expected_gradient_and_ours_has(tmp_path, corrected):
    """Over every token v that can be sampled, with chance p_v, q_v the reference's.

    k1: sum_v p_v grad log p_v = 0, to 1e-6 of its terms. The trainer's loss without advantages: the gradient of KL(p, q),
    sum_v p_v log(p_v / q_v) grad log p_v; uncorrected k3: sum_v (p_v - q_v) grad log p_v. To 1e-4.
    """
    trainer = setups.ppo(tmp_path, beta=1.0, vf_coef=0.0, num_iterations=1, use_bias_correction_kl=corrected)
    weight, prompt = trainer.model.get_input_embeddings().weight, torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        weight.add_(0.1 * torch.randn_like(weight))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    table, other = (m(input_ids=prompt).logits[0, -1].log_softmax(-1) for m in (trainer.model, trainer.ref_model))
    slopes = torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0] for x in table])
    p, log_p, log_q = table.exp().detach(), table.detach(), other.detach()
    k1 = (p[:, None, None] * slopes).sum(0)
    assert k1.abs().max() <= 1e-6 * slopes.abs().max()
    factor = p * (log_p - log_q) if corrected else p - log_q.exp()
    wanted = (factor[:, None, None] * slopes).sum(0)
    found = torch.zeros_like(weight)
    one = torch.ones(1, 1, dtype=torch.long)
    for v, chance in enumerate(p):
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": one * v,
            "completion_mask": one,
            "advantages": torch.zeros(1, 1),
            "num_items_in_batch": torch.tensor(1),
            "values": torch.zeros(1, 1),
            "returns": torch.zeros(1, 1),
            "ref_per_token_logps": log_q[v].view(1, 1),
        }
        found += chance * torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), weight)[0]
    assert wanted.norm() > 1e-2 and (found - wanted).norm() <= 1e-4 * wanted.norm()


# -- early stop -----------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Weights and optimizer state after each step."""

    def __init__(self, trainer):
        self.trainer, self.seen, self.forwards = trainer, [], []
        trainer.model.register_forward_hook(lambda *_: self.forwards.append(trainer.state.global_step))

    def on_step_end(self, *_, **__):
        state = self.trainer._named_state()
        moments = {f"{n}|{k}": x.clone() for n, entries in state.items() for k, x in entries.items()}
        self.seen.append({**setups.trained(self.trainer), **moments})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "steps_per_generation": 2}], ids=str)
def test_a_tiny_target_takes_the_first_step_of_each_rollout(tmp_path, changes):
    """Not a bit of weights, moments or their step counts moves in the others, which compute nothing after the first."""
    given = {"num_iterations": 3, "target_kl": 1e-9, "max_steps": 6, "weight_decay": 0.1, **changes}
    trainer = setups.ppo(tmp_path, **given)
    watch = Watch(trainer)
    before = setups.trained(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert setups.logged(trainer, "ppo/stopped") == [0, 1, 1, 0, 1, 1]
    assert [x > 1e-9 for x in setups.logged(trainer, "ppo/approx_kl")] == [False, True, False, True]
    first, *others = watch.seen
    assert not torch.equal(first["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert same(first, others[0]) and same(first, others[1])
    assert not torch.equal(others[1]["model.embed_tokens.weight"], others[2]["model.embed_tokens.weight"])
    assert same(others[2], others[3]) and same(others[2], others[4])
    assert others[4]["model.embed_tokens.weight|step"] == others[4]["critic.score.weight|step"] == 2
    assert 2 not in watch.forwards and 5 not in watch.forwards and 1 in watch.forwards


def test_the_step_that_exceeds_is_the_one_that_is_dropped(tmp_path):
    """Two runs, without and with a target between the divergences of steps 2 and 3: alike to the bit until then."""
    given = {"num_iterations": 4, "max_steps": 4, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    free = setups.ppo(tmp_path, **given)
    watched = Watch(free)
    free.add_callback(watched)
    free.train()
    found = setups.logged(free, "ppo/approx_kl")
    assert found == sorted(found)
    stopped = setups.ppo(tmp_path, target_kl=(found[1] + found[2]) / 2, **given)
    watch = Watch(stopped)
    stopped.add_callback(watch)
    stopped.train()
    assert setups.logged(stopped, "ppo/approx_kl") == found[:3]
    assert setups.logged(stopped, "ppo/stopped") == [0, 0, 1, 1]
    assert all(same(a, b) for a, b in zip(watched.seen[:2], watch.seen[:2]))
    assert same(watch.seen[1], watch.seen[3]) and not same(watched.seen[1], watched.seen[2])


def test_a_target_that_is_never_reached_changes_no_bit(tmp_path):
    runs = []
    for target in (None, 1e9):
        runs.append(setups.ppo(tmp_path, target_kl=target))
        runs[-1].train()
    assert same(*map(setups.trained, runs))


# -- optimizer ------------------------------------------------------------------------------------------------------


def test_critic_has_its_own_rate_and_bound(tmp_path):
    trainer = setups.ppo(tmp_path, critic_learning_rate=5e-3, max_grad_norm=1e-3, weight_decay=0.1, max_steps=1)
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            for model in (trainer.model, trainer.critic):
                norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    trainer.add_callback(Norms())
    trainer.train()
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    critic = set(trainer.critic.parameters())
    rates = {
        (group["initial_lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        if critic & {*group["params"]}
    }
    assert rates == {(5e-3, 0.1), (5e-3, 0.0)}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len({*held}) == len([*trainer.model.parameters()]) + len(critic)
    decayed = {p for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert trainer.critic.score.weight in decayed and trainer.critic.score.bias not in decayed


def test_what_is_logged_of_micro_batches_is_of_all_their_tokens(tmp_path):
    """Completions of several lengths, eight at once and two at a time: the same figures, to 1e-5."""
    found = []
    for size in (8, 2):
        trainer = setups.ppo(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1
        )
        trainer.train()
        logs = trainer.state.log_history[0]
        assert logs["completions/min_length"] < logs["completions/max_length"]
        found.append({k: v for k, v in logs.items() if k.startswith("ppo/") or k == "loss"})
    assert "ppo/value_loss" in found[0] and found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-9)


def test_without_value_loss_the_critic_stays_and_the_policy_learns(tmp_path):
    trainer = setups.ppo(tmp_path, vf_coef=0.0, weight_decay=0.1, target_kl=1e-9)
    before = setups.trained(trainer)
    trainer.train()
    after = setups.trained(trainer)
    assert all(torch.equal(before[n], after[n]) == n.startswith("critic.") for n in before)
    assert not setups.logged(trainer, "ppo/value_loss") and setups.logged(trainer, "ppo/stopped") == [0, 1, 0]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """To 1e-6."""
    runs = []
    for on in (False, True):
        runs.append(setups.ppo(tmp_path, gradient_checkpointing=on))
        runs[-1].train()
    a, b = map(setups.trained, runs)
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert runs[1].critic.is_gradient_checkpointing


# -- saving, PEFT, evaluation ---------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    trainer = setups.ppo(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = torch.randint(3, 40, (2, 7))
    for model, folder in ((trainer.model, "final"), (trainer.critic, "final/critic")):
        kind = AutoModelForCausalLM if model is trainer.model else AutoModelForTokenClassification
        loaded = kind.from_pretrained(tmp_path / folder)
        assert same(loaded.state_dict(), model.state_dict())
        assert torch.allclose(loaded.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6)
    suffixes = {file.suffix for file in (tmp_path / "final").rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".md", ".jinja"}
    again = setups.ppo(tmp_path / "next", critic_model=str(tmp_path / "final" / "critic"))
    assert same(again.critic.state_dict(), trainer.critic.state_dict())


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_an_adapter_learns_and_the_whole_critic(tmp_path, beta):
    trainer = setups.ppo(tmp_path, peft_config=setups.lora(), beta=beta)
    before = setups.trained(trainer)
    trainer.train()
    moved = {n for n, x in setups.trained(trainer).items() if not torch.equal(x, before[n])}
    assert moved and all("lora" in n or n.startswith("critic.") for n in moved)
    assert {n for n in before if n.startswith("critic.")} <= moved
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
    assert AutoModelForTokenClassification.from_pretrained(tmp_path / "final" / "critic").num_labels == 1


def test_evaluation_is_the_parents(tmp_path):
    trainer = setups.ppo(tmp_path, per_device_eval_batch_size=4)
    before = dict(trainer._metrics["train"])
    found = trainer.evaluate(setups.prompts(4))
    assert "eval_loss" in found and not any("ppo" in name for name in found) and trainer._metrics["train"] == before


# -- refusals -------------------------------------------------------------------------------------------------------


def test_other_configurations_are_refused(tmp_path):
    from trl_ext import PPOTrainer

    args = setups.arguments(trl.GRPOConfig, tmp_path)
    with pytest.raises(ValueError, match="args is a GRPOConfig; PPO needs a PPOConfig"):
        PPOTrainer(setups.base_folder(tmp_path), setups.reward_digits, args, train_dataset=setups.prompts())


def test_a_reference_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"beta=0.02: .*this model has none"):
        setups.ppo(tmp_path, model=tiny.model())
    setups.ppo(tmp_path, model=tiny.model(std=0.1), beta=0.0, max_steps=1).train()


def test_unsloths_trainer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "GRPOTrainer", type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {}))
    with pytest.raises(RuntimeError, match="PPOTrainer needs TRL's own GRPOTrainer"):
        setups.ppo(tmp_path)


def test_vllm_must_be_there_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)
    with pytest.raises(ImportError, match="use_vllm=True: vLLM is not installed"):
        setups.ppo(tmp_path, model="no/such-model", use_vllm=True)


def test_what_is_no_critic_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Qwen3ForCausalLM with 2 labels"):
        setups.ppo(tmp_path, critic_model=tiny.model())


# -- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns(tmp_path):
    """Share of 1s among 8 tokens of a vocabulary of 64: below 0.1 at first, above 0.5 after 40 steps."""

    def ones(completions, **_):
        return [text.count("1") / 8 for text in completions]

    trainer = setups.ppo(
        tmp_path,
        reward=ones,
        rows=64,
        max_steps=40,
        max_completion_length=8,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        beta=0.0,
        lr_scheduler_type="constant",
        target_kl=0.25,
    )
    trainer.train()
    rewards = setups.logged(trainer, "reward")
    assert sum(rewards[:2]) / 2 < 0.1 and sum(rewards[-3:]) / 3 > 0.5, rewards


def test_explained_variance_is_of_the_returns(tmp_path):
    """1 - Var(returns - values) / Var(returns) over all tokens of the rollout, to 1e-4; values and returns apart."""
    trainer = setups.ppo(tmp_path, critic_model=loud(critic_of(tiny.model())), max_steps=1)
    seen = {}
    advantages = trainer._advantages

    def keep(inputs, output, rewards):
        result = advantages(inputs, output, rewards)
        seen.update(values=output["values"], returns=output["returns"])
        return result

    trainer._advantages = keep
    trainer.train()
    real = ~seen["returns"].isnan()
    values, returns = (seen[name][real].double() for name in ("values", "returns"))
    assert values.var() > 0.05 and returns.var() > 0.05 and (values.var() / returns.var() - 1).abs() > 0.1
    wanted = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
    logged = trainer.state.log_history[0]["ppo/explained_variance"]
    assert logged == pytest.approx(wanted.item(), abs=1e-4)


def test_one_process_of_an_engine_trains_its_critic_too(tmp_path, monkeypatch):
    """DeepSpeed with one GPU: the critic has an optimizer of its own, which takes the steps of the trainer's, bit for bit
    but for the order of its groups (1e-6)."""
    plain = setups.ppo(tmp_path / "plain", max_steps=2)
    plain.train()
    trainer = setups.ppo(tmp_path / "engine", max_steps=2)
    monkeypatch.setattr(trainer, "_sharded", lambda: True)
    before = {name: p.clone() for name, p in trainer.critic.named_parameters()}
    trainer.train()
    for name, parameter in trainer.critic.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert (parameter - plain.critic.get_parameter(name)).abs().max() <= 1e-6, name
