"""The loss against a plain one in float64, SFT where it is off, resuming, and what is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from tests import tiny
from tests.processes import fresh
from trl_ext import LogitsDistillConfig
from trl_ext.distill import logits as module
from trl_ext.distill.logits import token_terms

from . import setups


CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% endif %}{% endfor %}"
)
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"{a}+1"},
            {"role": "assistant", "content": f"so {a + 1}"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": f"{a}" * (a % 3 + 1)},
        ]
    }
    for a in range(1, 13)
]


def plain(student, teacher, batch, temperature, shared=64):
    """(CE, KL), means per trained token: dense logits, in float64, the KL as a sum over the vocabulary written out."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        ours, theirs = (net.double()(**inputs).logits[:, :-1] for net in (student, teacher))
    labels = batch["labels"][:, 1:]
    ce = F.cross_entropy(ours.flatten(0, 1), labels.flatten())
    p = torch.softmax(theirs[..., :shared] / temperature, -1)
    q = torch.softmax(ours[..., :shared] / temperature, -1)
    kl = (p * (p.log() - q.log())).sum(-1)
    return ce.item(), kl[labels != -100].mean().item()


def loss_of(trainer, batch):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_it_is_the_sum_over_the_vocabulary(tmp_path, alpha, temperature):
    """1e-5 relative (fp32), at the trained tokens: completions, not prompts or padding."""
    trainer = setups.logits(tmp_path, alpha=alpha, temperature=temperature)
    batch = setups.batch_of(trainer)
    assert (batch["labels"] == -100).sum() > (batch["attention_mask"] == 0).sum() > 0
    loss = loss_of(trainer, batch)
    ce, kl = plain(trainer.model, trainer.teacher, batch, temperature)
    assert kl > 0.01
    assert loss == pytest.approx(alpha * ce + (1 - alpha) * temperature**2 * kl, rel=1e-5)
    logged = trainer._metrics["train"]
    assert logged["loss/ce"] == [pytest.approx(ce, rel=1e-5)] and logged["loss/kl"] == [pytest.approx(kl, rel=1e-5)]


def test_without_cross_entropy_and_temperature_it_is_trls_gkd(tmp_path):
    """`GKDTrainer` with lmbda=0, beta=0. Its divergence is at temperature 1, whatever `temperature` is (docs/distill.md).

    1e-5 relative, fp32.
    """
    trainer = setups.logits(tmp_path, alpha=0.0, temperature=1.0)
    trainer.teacher.resize_token_embeddings(trainer.model.vocab_size)  # the padding of the two may not differ there
    batch = setups.batch_of(trainer)
    ours = loss_of(trainer, batch)
    gkd = GKDTrainer.__new__(GKDTrainer)
    gkd.teacher_model, gkd.beta, gkd.temperature = trainer.teacher, 0.0, 4.0
    theirs = gkd.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    assert theirs.item() == pytest.approx(ours, rel=1e-5) and ours > 0.01


def test_it_is_not_the_tutorials(tmp_path):
    """`batchmean` on (B, T, V) logits divides by B alone: T times ours on a batch whose every token is trained."""
    rows = [{"prompt": "", "completion": row["prompt"][:4] + "abcdef"} for row in setups.ROWS]
    rows = [{"text": row["completion"]} for row in rows if len(row["completion"]) == 10]
    trainer = setups.logits(tmp_path, rows=rows, alpha=0.0, temperature=1.0)
    batch = setups.batch_of(trainer)
    assert (batch["labels"] != -100).all()
    loss, positions = loss_of(trainer, batch), batch["labels"].shape[1] - 1
    with torch.no_grad():
        ours, theirs = (net(batch["input_ids"]).logits[:, :-1, :64] for net in (trainer.model, trainer.teacher))
    tutorials = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean").item()
    assert tutorials == pytest.approx(positions * loss, rel=1e-4) and tutorials > 5 * loss


@pytest.mark.parametrize("chunk", [3, 2048])
def test_gradients_are_those_of_the_dense_loss(tmp_path, monkeypatch, chunk):
    """In float64, 1e-9 of the largest, in chunks of three tokens too; none goes to the teacher."""
    monkeypatch.setattr(module, "TOKENS_PER_CHUNK", chunk)
    trainer = setups.logits(tmp_path, alpha=0.3, temperature=2.0)
    student, teacher = trainer.model.double(), trainer.teacher.double()
    batch = setups.batch_of(trainer)
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    found = {n: p.grad.clone() for n, p in student.named_parameters()}
    student.zero_grad()
    labels, inputs = batch["labels"][:, 1:], {k: v for k, v in batch.items() if k != "labels"}
    at = labels != -100
    ours, theirs = (net(**inputs).logits[:, :-1][at] for net in (student, teacher))
    p = (theirs[:, :64] / 2).softmax(-1)
    kl = (p * (p.log() - (ours / 2).log_softmax(-1))).sum(-1).mean()
    (0.3 * F.cross_entropy(ours, labels[at]) + 0.7 * 4 * kl).backward()
    scale = max(p.grad.abs().max() for p in student.parameters())
    assert all((found[n] - p.grad).abs().max() <= 1e-9 * scale for n, p in student.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_token_terms_in_half_precision_are_computed_in_fp32():
    """Logits of 20 rounded to bfloat16 give the terms of the same numbers in fp32, to the bit."""
    logits = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * 20).bfloat16()
    half = token_terms(*logits, torch.arange(5), 1.5)
    assert all(torch.equal(a, b) for a, b in zip(half, token_terms(*logits.float(), torch.arange(5), 1.5), strict=True))
    assert half[0].dtype == half[1].dtype == torch.float32
    same = token_terms(logits[0], logits[0], torch.arange(5), 1.5)
    assert not same[1].any()


def test_cross_entropy_and_metrics_are_sfts(tmp_path):
    """One micro-batch with prompts, padding and a mixture of experts: entropy, accuracy, auxiliary loss, tokens; 1e-6."""
    ours = setups.logits(tmp_path, setups.model(setups.moe_config()), alpha=0.5)
    stock = SFTTrainer(
        setups.model(setups.moe_config()),
        SFTConfig(**setups.settings(tmp_path)),
        train_dataset=Dataset.from_list(setups.ROWS),
        processing_class=tiny.tokenizer(()),
    )
    batch = setups.batch_of(ours)
    loss, mixed = loss_of(stock, batch), loss_of(ours, batch)
    a, b = ours._metrics["train"], stock._metrics["train"]
    assert a.keys() - b.keys() == {"loss/ce", "loss/kl"}
    assert all(a[name] == pytest.approx(b[name], rel=1e-6) for name in b)
    aux = 0.05 * a["aux_loss"][0]
    assert aux > 0.01 and a["loss/ce"][0] + aux == pytest.approx(loss, rel=1e-6)
    assert mixed == pytest.approx(0.5 * a["loss/ce"][0] + 0.5 * 2.25 * a["loss/kl"][0] + aux, rel=1e-6)


@pytest.mark.parametrize("rows", ["completions", "conversations"])
def test_accumulated_steps_are_one_batch(tmp_path, rows):
    """Of unequal lengths, assistant-only too: weights 1e-6 (SGD), every figure logged but SFT's own means 1e-5."""
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = CHAT
    talks = {"rows": TALKS, "assistant_only_loss": True} if rows == "conversations" else {}
    one, many = (
        setups.logits(
            tmp_path,
            tokenizer=tokenizer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            alpha=0.3,
            **talks,
        )
        for size in (8, 2)
    )
    share = np.mean([np.mean(np.array(row) != -100) for row in one.train_dataset["labels"]])
    assert 0.2 < share < 0.8
    a, b = setups.trained(one), setups.trained(many)
    assert all((a[n] - b[n]).abs().max() <= 1e-6 for n in a)
    for together, apart in zip(setups.losses(one)[:2], setups.losses(many)[:2], strict=True):
        for name in ("loss", "loss/ce", "loss/kl", "grad_norm"):
            assert apart[name] == pytest.approx(together[name], rel=1e-5), name


def test_padding_free_batches_are_padded_ones(tmp_path):
    """Four texts side by side are not read as one: 1e-6 relative; the first tokens of each are not trained."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in setups.ROWS]
    padded, flat = (
        setups.logits(tmp_path, rows=rows, padding_free=free, max_length=None, alpha=0.3) for free in (False, True)
    )
    batch = setups.batch_of(flat)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert loss_of(flat, batch) == pytest.approx(loss_of(padded, setups.batch_of(padded)), rel=1e-6)
    packed = setups.logits(tmp_path, rows=rows, packing=True, max_length=64, alpha=0.3)
    assert loss_of(packed, setups.batch_of(packed, [0])) > 0
    packed.train()


def test_a_mixture_of_experts_teaches_without_its_auxiliary_loss(tmp_path):
    """Whatever its coefficient; student dense or not. The routers of a student that has some learn."""
    teachers = [
        setups.model(setups.moe_config(router_aux_loss_coef=c, output_router_logits=True), 7) for c in (0.0, 9.0)
    ]
    for config in (setups.config(), setups.moe_config()):
        runs = [setups.logits(tmp_path, setups.model(config), t, alpha=0.2) for t in teachers]
        assert loss_of(runs[0], setups.batch_of(runs[0])) == loss_of(runs[1], setups.batch_of(runs[1]))
    trainer = setups.logits(tmp_path, setups.model(setups.moe_config()), teachers[1], alpha=0.2, max_steps=2)
    before = setups.weights(trainer)
    after = setups.trained(trainer)
    assert not [n for n in after if torch.equal(after[n], before[n]) and "gate.weight" in n]


@pytest.mark.parametrize("peft", [True, False])
def test_resumed_is_uninterrupted(tmp_path, peft):
    """At step 2 of 4: parameters, bit for bit, and the steps' figures; the teacher stays as it was."""
    changes = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = setups.logits(tmp_path, peft=peft, per_device_train_batch_size=2, **changes)
    teacher = {n: p.detach().clone() for n, p in whole.teacher.named_parameters()}
    after = setups.trained(whole)
    again = setups.logits(tmp_path, peft=peft, per_device_train_batch_size=2, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, after[n]) for n, p in again.model.named_parameters())
    assert setups.losses(again)[:4] == setups.losses(whole)[:4]
    assert all(torch.equal(p, teacher[n]) for n, p in whole.teacher.named_parameters())


def test_what_was_saved_is_a_stock_model(tmp_path):
    """Loaded in a fresh process without this package: the same logits; no pickle, no teacher."""
    trainer = setups.logits(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ids = torch.arange(3, 40)[None]
    torch.save({"ids": ids, "logits": trainer.model.eval()(ids).logits.detach()}, tmp_path / "wanted.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
wanted = torch.load(sys.argv[1] + "/wanted.pt")
found = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/saved")(wanted["ids"]).logits
assert torch.equal(found, wanted["logits"]) and "trl_ext" not in sys.modules
"""
    done = fresh("-c", code, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = {file.name for file in (tmp_path / "saved").iterdir()}
    assert not [name for name in saved if name.endswith((".bin", ".pt"))]
    assert sum("safetensors" in name for name in saved) == 1


def test_evaluation_and_outputs_are_the_parents(tmp_path):
    """The evaluation's loss is the plain one over equal batches, 1e-5; `return_outputs` has the whole logits."""
    seen = {}

    def metrics(prediction):
        logits, labels = (torch.from_numpy(x) for x in (prediction.predictions, prediction.label_ids))
        ce = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
        return seen.setdefault("found", {"mine": ce.item()})

    trainer = setups.logits(
        tmp_path, alpha=0.3, eval_strategy="steps", eval_steps=2, max_steps=2, per_device_eval_batch_size=8
    )
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    rows = [{k: trainer.eval_dataset[i][k] for k in ("input_ids", "labels")} for i in range(8)]
    batch = trainer.data_collator(rows)
    loss, outputs = trainer.compute_loss(trainer.model.eval(), dict(batch), return_outputs=True)
    assert outputs.logits.shape == (*batch["input_ids"].shape, 64) and loss.item() == logged["eval_loss"]
    trainer.compute_metrics = metrics
    trainer.evaluate()
    assert seen["found"]["mine"] == pytest.approx(logged["eval_loss/ce"], rel=1e-5)
    ce, kl = plain(trainer.model, trainer.teacher, batch, 1.5)
    assert logged["eval_loss/ce"] == pytest.approx(ce, rel=1e-5)
    assert logged["eval_loss/kl"] == pytest.approx(kl, rel=1e-5)
    assert logged["eval_loss"] == pytest.approx(0.3 * ce + 0.7 * 2.25 * kl, rel=1e-5)


def test_a_batch_without_trained_tokens_is_a_zero(tmp_path):
    trainer = setups.logits(tmp_path)
    batch = setups.batch_of(trainer)
    batch["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    """Without cross-entropy, 60 steps: less than half of the KL is left; gradient checkpointing changes nothing (1e-5)."""
    runs = [
        setups.logits(tmp_path, alpha=0.0, max_steps=60, learning_rate=1e-2, gradient_checkpointing=on)
        for on in (False, True)
    ]
    logs = []
    for trainer in runs:
        trainer.train()
        logs.append([e["loss/kl"] for e in trainer.state.log_history if "loss/kl" in e])
    assert logs[0][-1] < logs[0][0] / 2 and logs[0][:5] == pytest.approx(logs[1][:5], rel=1e-5)


def test_vocabulary_rows_may_differ_in_padding_alone(tmp_path):
    """Teacher with fewer or more rows: over the rows that both have, 1e-5; with fewer than tokens: named, either way."""
    tokens = len(tiny.tokenizer(()))
    for rows in (tokens, 60, 72):
        trainer = setups.logits(tmp_path, teacher_model=setups.teacher(vocab_size=rows), alpha=0.0, temperature=1.0)
        batch = setups.batch_of(trainer)
        loss = loss_of(trainer, batch)
        assert loss == pytest.approx(plain(trainer.model, trainer.teacher, batch, 1.0, min(rows, 64))[1], rel=1e-5)
    with pytest.raises(
        ValueError, match=f"teacher has {tokens - 1} embeddings, but the student's tokenizer has {tokens}"
    ):
        setups.logits(tmp_path, teacher_model=setups.teacher(vocab_size=tokens - 1))
    with pytest.raises(ValueError, match=r"the model has 30 embeddings, but .*resize_token_embeddings"):
        setups.logits(tmp_path, model=setups.student(vocab_size=30))
    with pytest.raises(ValueError, match="have different vocabularies"):
        other = tiny.tokenizer(("1#", "##"))
        setups.logits(tmp_path, tokenizer=tiny.tokenizer(("##", "1#")), given={"teacher_processing_class": other})


def test_teachers_by_name(tmp_path):
    """From the field, in its own dtype or that asked for."""
    setups.teacher().to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(()).save_pretrained(tmp_path / "teacher")
    name = {"teacher_model": None, "teacher_model_name_or_path": str(tmp_path / "teacher")}
    trainer = setups.logits(tmp_path, **name)
    assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    trainer.train()
    wide = setups.logits(tmp_path, **name, teacher_model_init_kwargs='{"dtype": "float32"}')
    assert wide.teacher.dtype == torch.float32


def test_what_cannot_be_distilled_is_named(tmp_path):
    with pytest.raises(ValueError, match="teacher_model: pass a teacher"):
        setups.logits(tmp_path, teacher_model=None)
    with pytest.raises(ValueError, match="teacher_model_init_kwargs"):
        setups.logits(tmp_path, teacher_model_init_kwargs={"dtype": "float32"})
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        setups.logits(tmp_path, peft=virtual)
    assert setups.logits(tmp_path, teacher_model=None, peft=virtual, alpha=1.0).teacher is None
    with pytest.raises(ValueError, match="needs a LogitsDistillConfig"):
        module.LogitsDistillTrainer(setups.student(), SFTConfig(**setups.settings(tmp_path)))


def test_the_constructor_is_sfttrainers(tmp_path):
    """By position."""
    rows, args = Dataset.from_list(setups.ROWS), LogitsDistillConfig(**setups.settings(tmp_path))
    trainer = module.LogitsDistillTrainer(
        setups.student(), args, None, rows, rows, tiny.tokenizer(()), teacher_model=setups.teacher()
    )
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
