"""The loss against a plain one, SFT where it is off, what learns, dropouts, evaluation, probes."""

import math

import pytest
import torch
from torch.nn import functional as F

from trl_ext.planner import em, losses
from unsloth_ext import backbone_of, executor_forward, executor_prefix, plan, plan_log_prob, plan_soft

from . import setups


SOFT = {
    "commitment_weight": 0.3,
    "usage_weight": 0.2,
    "eos_weight": 0.4,
    "target_length": [2.0, 1.0],
    "quota_weight": 0.7,
    "z_dropout": 0.3,
    "word_dropout": 0.3,
    "usage_window": 20.0,
    "signal_weight": 0.8,
    "entropy_weight": 0.35,
}
CASES = {
    "soft": SOFT,
    "hard_em": {
        "training": "hard_em",
        "planner_weight": 0.6,
        "z_dropout": 0.0,
        "num_beams": 4,
        "num_candidates": 0,
        "signal_weight": 0.8,
    },
}
WATCHED = (
    "monitor/cos",
    "monitor/l2",
    "monitor/planner_grad_norm",
    "monitor/entropy_a",
    "monitor/entropy_b",
    "monitor/max_prob_a",
    "monitor/max_prob_b",
    "planner/expected_length_a",
    "planner/perplexity_b",
)


def cross_entropy(trainer, batch, plans, null=None, dropped=None):
    """Sum over tokens."""
    hidden = executor_forward(
        trainer.model, executor_prefix(trainer.model, plans, null), batch["input_ids"], batch["attention_mask"], dropped
    )
    logits = trainer.model.get_output_embeddings()(hidden)
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("way", setups.WAYS)
def test_the_soft_loss_is_its_terms(tmp_path, way, peft):
    """1e-5, and each term as it is logged; the same draws in the same order."""
    trainer = setups.trainer(tmp_path, peft, ordering=way[0], multi_token=way[1], mode="reconstruct", **SOFT)
    quota = trainer.planner_state["quota"]
    quota.multipliers.copy_(torch.tensor([0.5, -0.3]))
    trainer.planner_state["usage"].update([torch.arange(1.0, 6), torch.arange(1.0, 5)])
    trainer.model.train()
    batch = setups.batch_of(trainer, range(6))
    torch.manual_seed(5)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.manual_seed(5)
    soft = plan_soft(trainer.model, batch["plan_input_ids"], batch["plan_attention_mask"], 1.0)
    null, dropped = torch.rand(6) < 0.3, torch.rand(batch["input_ids"].shape) < 0.3
    assert 0 < null.sum() < 6
    c = (soft.expected_lengths.mean(0) - torch.tensor([2.0, 1.0])) / torch.tensor([3, 2])
    shares = []
    for i, start in enumerate((torch.arange(1.0, 6), torch.arange(1.0, 5))):
        use = losses.expected_use(soft, i)
        old, new = (float(x.sum()) / (20 * len(x)) for x in (start, use.detach()))
        old *= 1 - new
        assert 0 < new < 1
        shares.append((old * start / start.sum() + new * use / use.sum()) / (old + new))
    wanted = {
        "executor": cross_entropy(trainer, batch, soft, null, dropped) / batch["attention_mask"].sum(),
        "commitment": losses.commitment_loss(soft).mean(),
        "eos": losses.loss_eos(soft, [3, 2]).mean(),
        "usage": sum(math.log(len(s)) + (s * s.log()).sum() for s in shares) / 2,
        "quota": (torch.tensor([0.5, -0.3]) * c + 5 * c**2).sum(),
        "signal": losses.signal_nll(trainer.model, batch, soft, batch["labels"][:, 1:] != -100)
        / batch["attention_mask"].sum(),
        "entropy": -losses.mean_entropy(
            soft.log_probs, [soft.open[:, i, : x.shape[1]] for i, x in enumerate(soft.log_probs)]
        ),
    }
    found = setups.figures(trainer)
    scale = {"executor": 1, "commitment": 0.3, "eos": 0.4, "usage": 0.2, "quota": 0.7, "signal": 0.8, "entropy": 0.35}
    assert abs(loss - sum(scale[name] * value for name, value in wanted.items())) <= 1e-5
    for name, value in wanted.items():
        assert abs(found[f"loss/{name}"] - value) <= 1e-5, name


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("way", setups.WAYS)
def test_the_m_step_is_cross_entropy_on_the_best_plans(tmp_path, way, peft):
    """1e-5: of executor and planner, per token of the text."""
    trainer = setups.trainer(tmp_path, peft, ordering=way[0], multi_token=way[1], **CASES["hard_em"])
    trainer.model.train()
    batch = setups.batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    plans, known = trainer.planner_state["cache"].get(batch["sample_id"])
    assert known.all() and torch.equal(plans, trainer.last_e_step.plans)
    beams = plan(
        trainer.model, batch["plan_input_ids"], batch["plan_attention_mask"], num_beams=4, num_return_sequences=4
    )
    scores = em.score_plans(trainer.model, batch, beams.unflatten(0, (4, 4)))
    assert torch.equal(plans, beams.unflatten(0, (4, 4))[torch.arange(4), scores.argmax(1)])
    tokens = batch["attention_mask"].sum()
    executor = cross_entropy(trainer, batch, plans) / tokens
    planner = -plan_log_prob(trainer.model, batch["plan_input_ids"], batch["plan_attention_mask"], plans).sum() / tokens
    signal = losses.signal_nll(trainer.model, batch, plans, batch["labels"][:, 1:] != -100) / tokens
    assert abs(loss - (executor + 0.6 * planner + 0.8 * signal)) <= 1e-5
    found = setups.figures(trainer)
    for name, value in (("executor", executor), ("planner", planner), ("signal", signal)):
        assert abs(found[f"loss/{name}"] - value) <= 1e-5


def test_accumulated_steps_are_one_batch(tmp_path):
    """Hard EM on beams, texts of 2 to 9 tokens: SGD, 1e-6, and what is logged, 1e-5."""
    one, many = (
        setups.trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            e_step_every=2,
            **CASES["hard_em"],
        )
        for size in (8, 2)
    )
    for trainer in (one, many):
        trainer.train()
    a, b = setups.weights(one), setups.weights(many)
    assert all((a[n] - b[n]).abs().max() <= 1e-6 for n in a)
    for name in ("loss", "loss/executor", "loss/planner", "em/margin", "num_tokens", *WATCHED):
        assert setups.logged(many, name) == pytest.approx(setups.logged(one, name), rel=1e-5), name


def test_accumulated_soft_steps_are_one_batch(tmp_path, monkeypatch):
    """Without noise, so that draws are the same; terms that are means over rows or sums over tokens, 1e-6. Those of use and
    quota are of each micro-batch, what goes on from step to step of all."""
    monkeypatch.setattr(
        "unsloth_ext.planner.decoding_strategies.gumbel_noise", lambda logits, _: torch.zeros_like(logits)
    )
    changes = {
        "usage_weight": 0.0,
        "z_dropout": 0.0,
        "eos_weight": 0.4,
        "target_length": [2.0, 1.0],
        "quota_weight": 0.0,
    }
    one, many = (
        setups.trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **changes,
        )
        for size in (8, 2)
    )
    for trainer in (one, many):
        trainer.train()
    a, b = setups.weights(one), setups.weights(many)
    assert all((a[n] - b[n]).abs().max() <= 1e-6 for n in a)
    for name in ("loss", "loss/executor", "loss/commitment", "loss/eos", *WATCHED):
        assert setups.logged(many, name) == pytest.approx(setups.logged(one, name), rel=1e-4, abs=1e-6), name
    for part in ("quota", "usage"):
        for x, y in zip(one.planner_state[part].state_dict().values(), many.planner_state[part].state_dict().values()):
            assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_with_lora_the_base_stays_as_it_is_and_without_all_is_trained(tmp_path, case):
    for peft in (True, False):
        trainer = setups.trainer(tmp_path, peft, **CASES[case])
        before = setups.weights(trainer)
        trainer.train()
        after = setups.weights(trainer)
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        learning = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert moved == learning
        tables = {name for name in moved if "unified_head" in name}
        assert len(tables) == 2 and ("default" in next(iter(tables))) == peft
        assert peft == all("lora_" in name for name in moved - tables)


def test_planner_learning_rate(tmp_path):
    trainer = setups.trainer(tmp_path, planner_learning_rate=0.5, max_steps=1, lr_scheduler_type="constant")
    trainer.create_optimizer()
    rates = {id(p): g["lr"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rates[id(parameter)] == (0.5 if "unified_head" in name else 3e-3), name


def test_dropouts_have_their_rates_and_reach_the_executor(tmp_path, monkeypatch):
    """4 standard errors over some 800 rows and 3,000 tokens."""
    from trl_ext.planner import trainer as module

    seen = {"null": [], "dropped": []}
    prefix, nll = module.executor_prefix, module.text_nll
    monkeypatch.setattr(
        module, "executor_prefix", lambda net, plans, null=None: seen["null"].append(null) or prefix(net, plans, null)
    )
    monkeypatch.setattr(module, "text_nll", lambda *args: seen["dropped"].append((args[4], args[3])) or nll(*args))
    trainer = setups.trainer(tmp_path, z_dropout=0.2, word_dropout=0.4, per_device_train_batch_size=24, max_steps=35)
    trainer.train()
    null = torch.cat(seen["null"])
    words = torch.cat([dropped[mask.bool()] for dropped, mask in seen["dropped"]])
    for found, rate in ((null, 0.2), (words, 0.4)):
        assert abs(found.float().mean() - rate) <= 4 * (rate * (1 - rate) / len(found)) ** 0.5
    seen["null"].clear(), seen["dropped"].clear()
    trainer = setups.trainer(tmp_path, z_dropout=0.0, word_dropout=0.0, max_steps=1)
    trainer.train()
    assert seen["null"] == [None] and seen["dropped"][0][0] is None


def test_null_plans_learn_the_null_embedding_and_nothing_else_does(tmp_path):
    for rate, moves in ((0.0, False), (0.9, True)):
        trainer = setups.trainer(tmp_path, z_dropout=rate, per_device_train_batch_size=24, max_steps=1)
        table = backbone_of(trainer.model).unified_head.table
        before = table.detach().clone()
        trainer.train()
        assert torch.equal(table[2], before[2]) != moves  # <NULL>
        assert torch.equal(table[3], before[3])  # <DROPPED>


def test_temperature_falls_by_the_same_factor(tmp_path):
    trainer = setups.trainer(tmp_path, temperature=2.0, temperature_end=0.5)
    trainer.train()
    found = setups.logged(trainer, "planner/temperature")
    assert found == pytest.approx([2.0 * 0.25 ** (k / 4) for k in range(4)])
    assert trainer.temperature == pytest.approx(0.5)


@pytest.mark.slow
def test_the_quota_is_reached(tmp_path):
    """0.3 concepts, the mean of five steps, from above and below, against what the same run does without."""
    changes = {
        "max_steps": 24,
        "lr_scheduler_type": "constant",
        "usage_weight": 0.0,
        "per_device_train_batch_size": 12,
        "types": [{"name": "a", "num_concepts": 4, "quota": 6}],
    }
    ends = {}
    for target in (None, 1.0, 5.0):
        trainer = setups.trainer(tmp_path, target_length=target, **changes)
        trainer.train()
        ends[target] = sum(setups.logged(trainer, "planner/expected_length_a")[-5:]) / 5
    assert abs(ends[1.0] - 1.0) <= 0.3 and abs(ends[5.0] - 5.0) <= 0.3, ends
    assert min(abs(ends[None] - target) for target in (1.0, 5.0)) > 0.4, ends


def test_use_is_averaged_over_steps(tmp_path):
    """1e-5: of all micro-batches of a step."""
    from trl_ext.planner import trainer as module

    seen = []
    trainer = setups.trainer(tmp_path, gradient_accumulation_steps=2, usage_window=20.0, max_steps=3)
    inner = module.expected_use
    module.expected_use = lambda soft, i: seen.append(inner(soft, i).detach()) or inner(soft, i)
    try:
        trainer.train()
    finally:
        module.expected_use = inner
    assert len(seen) == 3 * 2 * 2
    for i in range(2):
        average = weight = 0
        for step in range(3):
            use = sum(seen[step * 4 + micro * 2 + i] for micro in range(2))
            part = min(1, use.sum() / (20 * len(use)))
            average = (1 - part) * average + part * use / use.sum()
            weight = (1 - part) * weight + part
        found = trainer.planner_state["usage"].share(i)
        assert part < 1 and (found - average / weight).abs().max() <= 1e-5
        share = (average / average.sum()).clamp(min=1e-12)
        name = f"planner/perplexity_{'ab'[i]}"
        assert setups.logged(trainer, name)[-1] == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-4)


def test_e_steps_come_every_m_steps_and_for_rows_never_seen(tmp_path):
    trainer = setups.trainer(tmp_path, training="hard_em", max_steps=12, e_step_every=4, per_device_train_batch_size=8)
    seen = []
    inner = trainer._best_plans

    def watched(model, inputs):
        trainer.last_e_step = None
        known = trainer.planner_state["cache"].get(inputs["sample_id"])[1]
        plans = inner(model, inputs)
        rows = 0 if trainer.last_e_step is None else len(trainer.last_e_step.plans)
        seen.append((int((~known).sum()), rows))
        assert torch.equal(plans, trainer.planner_state["cache"].get(inputs["sample_id"])[0])
        return plans

    trainer._best_plans = watched
    trainer.train()  # 24 rows: an epoch is 3 steps
    assert seen == [(8, 8)] * 3 + [(0, 0), (0, 8), (0, 0), (0, 0), (0, 0), (0, 8), (0, 0), (0, 0), (0, 0)]
    assert len(setups.logged(trainer, "em/staleness")) == len(setups.logged(trainer, "em/flip_rate")) == 2
    assert all(gap >= 0 for gap in setups.logged(trainer, "em/staleness"))
    assert len(setups.logged(trainer, "em/margin")) == 5


def test_adaptive_intervals(tmp_path):
    for threshold, wanted in ((1e-9, [4.0] * 5 + [2.0] * 2), (1e9, [4.0] * 5 + [8.0] * 2)):
        trainer = setups.trainer(
            tmp_path,
            training="hard_em",
            max_steps=7,
            e_step_every=4,
            adaptive_e_step=True,
            learning_rate=5e-2,
            staleness_threshold=threshold,
            per_device_train_batch_size=24,
            num_candidates=7,
        )
        trainer.train()
        assert setups.logged(trainer, "em/interval") == wanted


@pytest.mark.parametrize("peft", [True, False])
def test_hard_em_with_gradient_checkpointing_changes_nothing(tmp_path, peft):
    """1e-5 after four steps (fp32)."""
    found = []
    for on in (False, True):
        trainer = setups.trainer(tmp_path, peft, gradient_checkpointing=on, **CASES["hard_em"])
        trainer.train()
        found.append(setups.weights(trainer))
    assert all((found[0][n] - found[1][n]).abs().max() <= 1e-5 for n in found[0])


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_of_greedy_plans_and_says_what_the_null_plan_costs(tmp_path, case):
    """1e-5, tokens alike, no dropout."""
    trainer = setups.trainer(tmp_path, per_device_eval_batch_size=8, **CASES[case])
    found = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    plans = plan(trainer.model, batch["plan_input_ids"], batch["plan_attention_mask"])
    tokens = batch["attention_mask"].sum()
    with torch.no_grad():
        own, null = (cross_entropy(trainer, batch, plans, n) / tokens for n in (None, torch.ones(8, dtype=torch.bool)))
    for name, value in (("loss", own), ("loss/executor", own), ("nll_null", null), ("delta_nll_null", null - own)):
        assert found[f"eval_{name}"] == pytest.approx(value.item(), abs=1e-5), name
    assert found["eval_planner/expected_length_a"] == (plans[:, 0] >= 0).sum(1).float().mean()
    trainer.args.per_device_eval_batch_size = 3  # the last batch is a smaller one
    again = trainer.evaluate()
    for name in (
        "loss/executor",
        "nll_null",
        "delta_nll_null",
        "planner/expected_length_a",
        "planner/expected_length_b",
    ):
        assert again[f"eval_{name}"] == pytest.approx(found[f"eval_{name}"], abs=1e-5), name


def test_probe(tmp_path):
    """1e-5; what it draws is its own, and training goes on as it was."""
    trainer = setups.trainer(tmp_path)
    trainer.model.train()
    batch = setups.batch_of(trainer, range(20))
    state = torch.get_rng_state()
    found = trainer.probe(dict(batch))
    assert trainer.model.training and torch.equal(torch.get_rng_state(), state)
    names = ("delta_nll_null", "delta_nll_random", "delta_nll_shuffled", "commonest_plan", "nll_0-64")
    assert found.keys() == {f"monitor/{name}" for name in names}
    assert found == trainer.probe(dict(batch))
    few = {name: value[:16] for name, value in batch.items()}
    plans = plan(trainer.model, few["plan_input_ids"], few["plan_attention_mask"])
    tokens = few["attention_mask"].sum()
    with torch.no_grad():
        own, null = (cross_entropy(trainer, few, plans, n) / tokens for n in (None, torch.ones(16, dtype=torch.bool)))
    assert found["monitor/delta_nll_null"] == pytest.approx((null - own).item(), abs=1e-5)
    assert found["monitor/nll_0-64"] == pytest.approx(own.item(), abs=1e-5)
    every = [str(row) for row in plans.tolist()]
    assert found["monitor/commonest_plan"] == max(map(every.count, every)) / 16
    alone = trainer.probe({name: value[:1] for name, value in batch.items()})
    assert "monitor/delta_nll_shuffled" not in alone and all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("case", CASES)
def test_what_is_logged_while_training(tmp_path, case):
    trainer = setups.trainer(tmp_path, length_curriculum=[4], **CASES[case])
    trainer.train()
    names = set(trainer.state.log_history[0])
    each = {
        f"{name}_{kind}"
        for kind in "ab"
        for name in ("planner/expected_length", "planner/perplexity", "monitor/entropy", "monitor/max_prob")
    }
    assert each | {"loss/executor", "planner/temperature", "planner/length", "num_tokens"} <= names
    only = {
        "soft": {f"loss/{x}" for x in ("commitment", "usage", "eos", "quota")},
        "hard_em": {"loss/planner", "em/margin", "em/interval"},
    }
    assert only[case] <= names and not names & only["soft" if case == "hard_em" else "hard_em"]
    assert {"monitor/cos", "monitor/l2"} <= names and min(setups.logged(trainer, "monitor/planner_grad_norm")) > 0


@pytest.mark.parametrize("case", CASES)
def test_cosine_and_distance_are_of_every_concept_of_the_plans(tmp_path, case, monkeypatch):
    """1e-5 against a loop; the first concept of a type, 0, is one like the others, and what is behind a plan's end none."""
    trainer = setups.trainer(tmp_path, max_steps=1, **CASES[case])
    best = torch.tensor([[[0, 4, -1], [2, 0, -1]], [[3, 0, 0], [1, -1, -1]]]).repeat(2, 1, 1)
    searched, seen, own = trainer._best_plans, [], trainer._watch_plans
    monkeypatch.setattr(trainer, "_best_plans", lambda *batch: (searched(*batch), best)[1])  # hard-EM's
    monkeypatch.setattr(trainer, "_watch_plans", lambda *plans: (seen.append(plans), own(*plans)))
    trainer.train()
    ((soft, hard, ids, *_),) = seen
    assert (ids == 0).any() and (ids < 0).any()
    pairs = [(soft[place], hard[place]) for place in map(tuple, (ids >= 0).nonzero().tolist())]
    for name, of in (("cos", lambda a, b: F.cosine_similarity(a, b, dim=0)), ("l2", lambda a, b: (a - b).norm())):
        wanted = sum(of(*pair).item() for pair in pairs) / len(pairs)
        assert setups.logged(trainer, f"monitor/{name}") == [pytest.approx(wanted, abs=1e-5)]


def test_turned_off_it_keeps_nothing_beside_the_optimizer(tmp_path):
    trainer = setups.trainer(tmp_path, use_planner=False)
    trainer.train()
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    assert list(tmp_path.glob("*")) and not list(tmp_path.glob("planner_state*"))
