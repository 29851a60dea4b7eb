"""The loss against a plain one, SFT where it is off, what learns, and resuming."""

import pytest
import torch
from torch.nn import functional as F

from tests.marks import slow
from unsloth_ext import MapProjectionAligner, create_structural_loss

from . import setups


def batch_of(trainer, indices=range(4)):
    rows = [trainer.train_dataset[i] for i in indices]
    keep = {"input_ids", "labels", "segment_ids", "teacher_input_ids", "teacher_segment_ids"}
    return trainer.data_collator([{k: row[k] for k in keep & row.keys()} for row in rows])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", setups.CASES)
def test_the_loss_is_cross_entropy_and_the_structural_one_of_the_caches(tmp_path, case, family):
    """1e-5: keys and values from each model's cache, queries by its own projections; all layers at once."""
    trainer = setups.trainer(tmp_path, family=family, lambda_kv=0.7, **setups.CASES[case])
    trainer.model.train()
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    sides = plain_kvq(trainer.model, range(2), inputs), plain_kvq(trainer.teacher, trainer.aligner.layers, inputs)
    with torch.no_grad():
        s, t, mask = trainer.aligner.pairs(*sides, batch["segment_ids"], T_s=trainer.args.T_s)
        structural, metrics = create_structural_loss(alpha_norm=trainer.args.alpha_norm)(*s, *t, mask)
        logits = trainer.model(**inputs).logits
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(loss - (ce + 0.7 * structural)) <= 1e-5
    logged = trainer._metrics["train"]
    for name, value in {"kv/loss": structural, "loss/ce": ce, **{f"kv/{n}": m for n, m in metrics.items()}}.items():
        assert abs(logged[name][-1] - value) <= 1e-4 * max(1, abs(value)), name


@torch.no_grad()
def plain_kvq(model, layers, inputs):
    """K and V of the cache, Q made anew from what each attention module is given."""
    queries = {}

    def keep(module, args, kwargs, out):
        queries[module.layer_idx] = query(module, **kwargs)

    hooks = [model.model.layers[i].self_attn.register_forward_hook(keep, with_kwargs=True) for i in layers]
    cache = model(**inputs, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    k, v = (torch.stack([getattr(cache.layers[i], name) for i in layers], dim=1) for name in ("keys", "values"))
    return k, v, torch.stack([queries[i] for i in layers], dim=1)


def query(attention, hidden_states, position_embeddings, **_):
    """As llama, qwen2 and qwen3 make it."""
    x = attention.q_proj(hidden_states).unflatten(-1, (-1, attention.head_dim))
    x = (attention.q_norm(x) if hasattr(attention, "q_norm") else x).transpose(1, 2)
    cos, sin = (table[:, None] for table in position_embeddings)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize("peft", [True, slow(False)])
@pytest.mark.parametrize("case", [c if c in ("default", "note", "warped") else slow(c) for c in setups.CASES])
def test_it_trains_what_it_should_and_resumes_exactly(tmp_path, case, peft):
    """Resumed at step 2 of 4: every parameter equal, bit for bit, the projection's too."""
    changes = {**setups.CASES[case], "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = setups.trainer(tmp_path, peft, per_device_train_batch_size=2, **changes)
    frozen = {n: p.detach().clone() for n, p in whole.teacher.named_parameters()}
    before = {n: p.detach().clone() for n, p in whole._named_trained().items()}
    after = setups.trained(whole)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    learning = {n for n, p in whole._named_trained().items() if p.requires_grad}
    assert moved >= learning and moved - learning <= {
        n for n in after if case == "closed form" and n.startswith("aligner")
    }
    assert any(n.startswith("aligner") for n in learning) == (case != "closed form")
    assert all(torch.equal(p, frozen[n]) and not p.requires_grad for n, p in whole.teacher.named_parameters())
    again = setups.trainer(tmp_path, peft, per_device_train_batch_size=2, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in again._named_trained().items():
        assert torch.equal(parameter, after[name]), name
    saved = MapProjectionAligner.from_pretrained(tmp_path / "checkpoint-4" / "aligner")
    for name, parameter in saved.named_parameters(prefix="aligner"):
        assert torch.equal(parameter, after[name])


@pytest.mark.parametrize("peft", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, peft):
    """1e-5 after four steps (fp32)."""
    plain, saving = (setups.trained(setups.trainer(tmp_path, peft, gradient_checkpointing=on)) for on in (False, True))
    assert all((plain[n] - saving[n]).abs().max() <= 1e-5 for n in plain)


@pytest.mark.parametrize("case", ["default", "warped"])
def test_accumulated_steps_are_one_batch(tmp_path, case):
    """Rows of 15 to 25 tokens: every token weighs the same, wherever it falls; SGD, 1e-6, and the terms logged."""
    changes = {**setups.CASES[case], **({"T_s": None} if case == "warped" else {})}
    one, many = (
        setups.trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **changes,
        )
        for size in (8, 2)
    )
    weights = [setups.trained(trainer) for trainer in (one, many)]
    assert all((weights[0][n] - weights[1][n]).abs().max() <= 1e-6 for n in weights[0])
    logs = [[entry for entry in trainer.state.log_history if "kv/loss" in entry] for trainer in (one, many)]
    for together, apart in zip(*logs, strict=True):
        for name in ("kv/loss", "kv/k", "kv/attn", "loss/ce"):
            assert apart[name] == pytest.approx(together[name], rel=1e-5), name


def test_evaluation_logs_the_terms_and_pads_never_matter(tmp_path):
    """A padded batch against its rows alone, 1e-5."""
    trainer = setups.trainer(tmp_path)
    logged = trainer.evaluate()
    assert {"eval_kv/loss", "eval_kv/k", "eval_kv/attn", "eval_kv/target_rank_k", "eval_loss/ce"} <= logged.keys()
    trainer.model.train()
    single = torch.stack([value(trainer, [i]) for i in range(4)])
    batch = batch_of(trainer)
    for junk in (0, 9):
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, junk)
        together = trainer.compute_loss(trainer.model, dict(batch))
        weights = (batch["attention_mask"].sum(1) / batch["attention_mask"].sum())[:, None]
        labels = (batch["labels"][:, 1:] != -100).sum(1)
        wanted = (single[:, :1] * weights).sum() + (single[:, 1] * labels / labels.sum()).sum()
        assert abs(together - wanted) <= 1e-5


def value(trainer, indices):
    """(structural, cross-entropy) of rows."""
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, indices)).detach()
    structural = trainer._metrics["train"]["kv/loss"][-1]
    return torch.tensor([structural, loss.item() - structural])


def test_a_collapsing_target_is_said_once(tmp_path, monkeypatch):
    from trl_ext.kv_distill import trainer as module

    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    changes = {"kv_direction": "teacher_to_student", "aligner_learning_rate": 0.05, "max_steps": 60, "lambda_kv": 20.0}
    setups.trainer(tmp_path, **changes).train()
    collapsing = [text for text in said if "collapsing" in text]
    assert collapsing and len(collapsing) == len({text.split()[0] for text in collapsing}) <= 4
    said.clear()
    setups.trainer(tmp_path, **{**changes, "kv_direction": "student_to_teacher", "max_steps": 10}).train()
    assert not said


def test_the_loss_goes_down_and_metrics_are_logged(tmp_path):
    trainer = setups.trainer(tmp_path, max_steps=30, learning_rate=1e-2)
    trainer.train()
    logs = [e for e in trainer.state.log_history if "kv/loss" in e]
    assert logs[-1]["kv/loss"] < 0.8 * logs[0]["kv/loss"] and logs[-1]["loss/ce"] < logs[0]["loss/ce"]
    assert {
        "kv/k",
        "kv/v",
        "kv/attn",
        "kv/target_std_k",
        "kv/target_std_v",
        "kv/target_rank_k",
        "kv/target_rank_v",
    } <= logs[0].keys()
