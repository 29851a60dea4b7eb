"""The shared trainer: its loss against a plain one, resume, and what it refuses."""

import itertools

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback

from tests import families, tiny
from tests.marks import slow
from unsloth_ext import backbone_of
from unsloth_ext.common.attention_tap import attention_tap
from unsloth_ext.kv_compression.compression import KVScoring, compress_kv
from unsloth_ext.latent.phase import latent_phase

from . import setups


def plain_terms(trainer, batch):
    """The loss terms row by row, unpadded, without a cache: latents are re-encoded with the whole sequence each time."""
    model, args = trainer.model, trainer.args
    backbone, config = backbone_of(model), backbone_of(model).latent_config
    bot, latent, _ = backbone.latent_token_ids
    embed, head = backbone.get_input_embeddings(), model.get_output_embeddings()
    project = getattr(backbone, "latent_projection", lambda h: h)
    sums = {"student": [], "teacher": [], "codi": [], "kv": [], "read": [], "written": {}}
    for i in range(len(batch["input_ids"])):

        def row(ids, mask, i=i):
            return batch[ids][i][batch[mask][i].bool()][None]

        question = row("question_ids", "question_mask")
        ids = torch.cat([question, row("teacher_ids", "teacher_mask")], dim=1)
        seen = []
        with attention_tap(model, lambda _, q, k, v, seen=seen: seen.append((q, k, v))):
            hidden = backbone(input_ids=ids, output_hidden_states=True).hidden_states
        start = question.shape[1]
        trace = int(batch["trace_mask"][i].sum())
        sums["teacher"].append(F.cross_entropy(head(hidden[-1])[0, start - 1 : -1], ids[0, start:], reduction="none"))
        kept = [
            compress_kv(
                k[:, :, start : start + trace],
                v[:, :, start : start + trace],
                q[:, :, start + trace :],
                config.num_latents,
                KVScoring(args.kv_scorer),
            )
            for q, k, v in seen
        ]
        front = embed(torch.cat([question, question.new_tensor([[bot]])], dim=1))
        count = config.num_latents
        steps = batch["teacher_ids"][i][batch["trace_mask"][i].bool()]
        if len(steps) > count:
            spread = [j * len(steps) // count for j in range(count)]
            steps = steps[:count] if args.latent_ce_tokens == "first" else steps[spread]
        passes = []
        if config.iterations is None:
            z = front[:, :0]
            for _ in range(count):
                last = backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state[:, -1:]
                z = torch.cat([z, project(last)], dim=1)
        else:
            z = embed(question.new_full((1, count), latent))
            for t in range(config.iterations):
                last = backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state
                passes.append(last)
                new = project(last[:, -count - 1 : -1])
                z = new if t == 0 else torch.cat([z[:, :1], new[:, 1:]], dim=1)
        passes.append(backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state)
        for last in passes if args.latent_ce_passes == "all" else passes[-1:]:
            read = head(last[0, -count - 1 : -1])[: len(steps)]
            sums["read"].append(F.cross_entropy(read, steps, reduction="none"))
        if args.w_step_decoder:
            after = [project(passes[-1][:, -1:])] if config.iterations is None else []
            inputs = torch.cat([z, *after], dim=1)[0]
            trace_ids = batch["teacher_ids"][i][: batch["trace_mask"][i].sum()].tolist()
            ends = [0, *batch["step_ends"][i].tolist()]
            ends = [*ends[: len(inputs)], ends[-1]]  # the last writes all steps left
            spans = [trace_ids[a:b] for a, b in itertools.pairwise(ends)]
            for k, span in enumerate(spans[: len(inputs)]):
                if not span:
                    continue
                labels = torch.tensor([*span, trainer.processing_class.eos_token_id])
                given = torch.cat([inputs[k : k + 1], embed(labels)[:-1]])
                logits = trainer._step_decoder(inputs_embeds=given[None]).logits[0]
                sums["written"].setdefault(k, []).append(F.cross_entropy(logits, labels, reduction="none"))
        answer = row("input_ids", "attention_mask")
        whole = torch.cat([front, z, embed(answer)], dim=1)
        student_seen = []
        with attention_tap(model, lambda _, q, k, v, seen=student_seen: seen.append((k, v))):
            states = backbone(inputs_embeds=whole, output_hidden_states=True).hidden_states
        mine = [h[0, -answer.shape[1] :] for h in states]
        sums["student"].append(F.cross_entropy(head(mine[-1])[:-1], answer[0, 1:], reduction="none"))
        at, there = int(batch["student_at"][i]), start + int(batch["teacher_at"][i])
        first = int(args.codi_skip_embeddings)
        sums["codi"].append(
            torch.stack(
                [F.smooth_l1_loss(a[at], b[0, there]) for a, b in zip(mine, hidden, strict=True)][first:]
            ).mean()
        )
        slots = slice(start + 1, start + 1 + count)
        for (k, v), want in zip(student_seen, kept, strict=True):
            fits = want.valid[0]
            for a, b in ((k, want.keys), (v, want.values)):
                sums["kv"].append(
                    F.smooth_l1_loss(a[:, :, slots][:, :, fits], b[:, :, fits], reduction="none").flatten()
                )
    return {
        "ce_student": torch.cat(sums["student"]).mean(),
        "ce_teacher": torch.cat(sums["teacher"]).mean(),
        "codi": torch.stack(sums["codi"]).mean(),
        **({"kv": torch.cat(sums["kv"]).mean()} if args.w_kv else {}),
        **({"latent_ce": torch.cat(sums["read"]).mean()} if args.w_latent_ce else {}),
        **({"step_decoder": steps_mean(sums["written"])} if args.w_step_decoder else {}),
    }


def steps_mean(losses):
    """The mean over latent tokens of the mean over the tokens of their steps."""
    return torch.stack([torch.cat(of_step).mean() for of_step in losses.values()]).mean()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("case", setups.CASES)
def test_every_term_is_the_plain_one(tmp_path, case, family):
    """Ragged batch, padded and cached, against single rows without either: 1e-5 (fp32)."""
    settings = {**setups.CASES[case], "codi_std_mode": "none", "kv_std_mode": "none"}
    trainer = setups.trainer(tmp_path, family=family, **settings)
    trainer.model.eval()
    rows = [setups.ROWS[i] for i in (0, 7, 19)]
    rows[1] = {"question": "100+7-3+1=", "steps": ["100+7=107", "107-3=104", "104+1=105"], "answer": "105"}
    batch = trainer.data_collator([trainer._rows(row, i, "test") for i, row in enumerate(rows)])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        wanted = plain_terms(trainer, batch)
    got = {name: trainer._metrics["eval"][f"loss/{name}"][-1] for name in wanted}
    for name, value in wanted.items():
        assert abs(got[name] - value) <= 1e-5, name
    assert abs(loss - sum(wanted.values())) <= 3e-5
    trainer.args.w_student, trainer.args.w_teacher, trainer.args.w_codi = 2.0, 3.0, 5.0
    weighted = trainer.compute_loss(trainer.model, dict(batch))
    weights = {"ce_student": 2, "ce_teacher": 3, "codi": 5, "kv": 1, "latent_ce": 1, "step_decoder": 1}
    assert abs(weighted - sum(weights[name] * value for name, value in wanted.items())) <= 1e-4


READ_OR_WRITTEN = [name for name in setups.CASES if name.endswith(("read", "written"))]


@pytest.mark.parametrize("case", READ_OR_WRITTEN)
def test_reading_the_latent_tokens_has_the_plain_gradient(tmp_path, case):
    """Of the term alone, through every pass: each trained weight, also the decoder's, to 1e-5 of the largest (fp32)."""
    trainer = setups.trainer(tmp_path, w_student=0.0, w_teacher=0.0, w_codi=0.0, **setups.CASES[case])
    model = trainer.model.eval()
    with torch.no_grad():  # LoRA starts at zero, where half of its gradients are
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = trainer.data_collator([trainer._rows(setups.ROWS[i], i, "test") for i in (0, 7, 19)])
    trained = {name: p for name, p in trainer._named_trained().items() if p.requires_grad}
    found = torch.autograd.grad(trainer.compute_loss(model, dict(batch)), trained.values(), allow_unused=True)
    plain = plain_terms(trainer, batch)
    term = plain["step_decoder" if "written" in case else "latent_ce"]
    wanted = torch.autograd.grad(term, trained.values(), allow_unused=True)
    largest = max(g.abs().max() for g in wanted if g is not None)
    assert largest > 1e-2
    for name, ours, theirs in zip(trained, found, wanted, strict=True):
        ours, theirs = (torch.zeros(()) if g is None else g for g in (ours, theirs))
        assert (ours - theirs).abs().max() <= 1e-5 * largest, name


def test_the_head_is_the_models_own(tmp_path):
    """Gemma 2 caps its logits. 1e-5 (fp32)."""
    model = families.model("gemma2, window", sliding_window=64, final_logit_softcapping=2.0)
    trainer = setups.trainer(tmp_path, model=model, max_length=64, **setups.CASES["sequential, read"])
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer._rows(setups.ROWS[0], 0, "test")])
    with torch.no_grad():
        trainer.compute_loss(model, dict(batch))
        bot = backbone_of(model).latent_token_ids[0]
        front = torch.cat([batch["question_ids"], batch["question_ids"].new_tensor([[bot]])], dim=1)
        state = latent_phase(model, batch["question_ids"], batch["question_mask"])
        whole = torch.cat([backbone_of(model).get_input_embeddings()(front), state.latents], dim=1)
        logits = model(inputs_embeds=whole).logits[0, -4:-1]
    steps = batch["teacher_ids"][0][batch["trace_mask"][0].bool()]
    steps = steps[[j * len(steps) // 3 for j in range(3)]]
    assert logits.abs().max() <= 2
    wanted = F.cross_entropy(logits, steps)
    assert trainer._metrics["eval"]["loss/latent_ce"][-1] == pytest.approx(wanted.item(), rel=1e-5)
    right = (logits.argmax(-1) == steps).float().mean().item()
    assert trainer._metrics["eval"]["latent/right_tokens"][-1] == pytest.approx(right)


@pytest.mark.parametrize("peft", [True, slow(False)])
@pytest.mark.parametrize("case", setups.CASES)
def test_it_trains_what_it_should_and_resumes_exactly(tmp_path, case, peft):
    """Resumed at step 2 of 4: every parameter equal, bit for bit."""
    settings = {**setups.CASES[case], "save_strategy": "steps", "save_steps": 2}
    whole = setups.trainer(tmp_path, peft, **settings)
    before = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    moved = {n for n, p in whole.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    if peft:
        assert any("trainable_tokens_delta" in n for n in moved)
    assert any("latent_projection" in n for n in moved) == ("projection_dim" in settings)
    again = setups.trainer(tmp_path, peft, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    there = again._named_trained()
    for name, parameter in whole._named_trained().items():
        assert torch.equal(parameter, there[name]), name


@pytest.mark.parametrize("family, tied", [("qwen3", True), ("qwen3", False), ("gpt2", True)])
def test_an_embedding_that_grew_resumes(tmp_path, family, tied):
    """By the latent tokens, as GPT-2's does; PEFT finds that out by the base's folder. Bit for bit."""
    config = tiny.config(family, len(tiny.tokenizer(())))
    config.tie_word_embeddings = tied
    tiny.from_config(config, std=0.1).save_pretrained(tmp_path / "base")
    settings = {**setups.CASES["jacobi"], "save_strategy": "steps", "save_steps": 2, "model": str(tmp_path / "base")}
    whole, again = (setups.trainer(tmp_path / "out", **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert whole.model.config.vocab_size > config.vocab_size
    for (n, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_a_path_is_as_good_as_a_model(tmp_path):
    """The trainer loads it, gives it latent tokens and sees the same losses, bit for bit."""
    tiny.model(std=0.1).save_pretrained(tmp_path / "base")
    losses = []
    for model in (None, str(tmp_path / "base")):
        trainer = setups.trainer(tmp_path, model=model, **setups.CASES["jacobi"])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_who_trains_all_weights_of_a_pretrained_model_is_warned(tmp_path, caplog, monkeypatch):
    caplog.set_level("WARNING")
    setups.trainer(tmp_path, peft=False, **setups.CASES["jacobi"])
    assert "All weights are trained" not in caplog.text  # of a toy there is nothing to lose
    monkeypatch.setattr("trl_ext.latent.preparation.NOT_A_TOY", 1000)
    setups.trainer(tmp_path, peft=False, **setups.CASES["jacobi"])
    assert "All weights are trained, because LoRA was not requested" in caplog.text


def test_evaluation_and_logging(tmp_path):
    trainer = setups.trainer(tmp_path, **setups.CASES["kv"])
    trainer.train()
    metrics = trainer.evaluate()
    terms = ("ce_student", "ce_teacher", "codi", "kv")
    assert {f"eval_loss/{t}" for t in terms} <= metrics.keys()
    assert {f"loss/{t}" for t in terms} <= trainer.state.log_history[0].keys()
    weights = {"ce_student": 1, "ce_teacher": 1, "codi": 1, "kv": 1}
    total = sum(weights[t] * metrics[f"eval_loss/{t}"] for t in terms)
    assert abs(metrics["eval_loss"] - total) <= 1e-4


UNEVEN = [
    {"question": f"{i}=", "steps": ["1" * (1 + 3 * i), "2" * (24 - i)], "answer": "7" * length}
    for i, length in enumerate((1, 2, 3, 5, 8, 12, 18, 24))
]


def step_of(folder, case: dict, size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and logged losses of one step over the eight rows of `UNEVEN`, `size` at a time."""
    trainer = setups.trainer(
        folder,
        rows=UNEVEN,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size,
        max_steps=1,
        max_grad_norm=0.0,
        **case,
    )
    found = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            found.update({n: p.grad.clone() for n, p in trainer._named_trained().items() if p.grad is not None})

    trainer.add_callback(Keep())
    trainer.train()
    return found, {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss")}


@pytest.mark.parametrize("case", ["sequential", "jacobi", "jacobi, read", "sequential, written", slow("kv")])
def test_micro_batches_add_up_to_the_batch(tmp_path, case):
    """Answers of 1 to 24 tokens, traces of 1 to 22: a step on eight rows, eight at once or one or two at a time. Gradients
    to 1e-4 of the largest, losses to 1e-5. Without standard deviations, which are a micro-batch's own."""
    case = {**setups.CASES[case], "kv_std_mode": "none", "codi_std_mode": "none"}
    whole, losses = step_of(tmp_path / "8", case, 8)
    assert losses.keys() >= {"loss", "loss/ce_student", "loss/ce_teacher", "loss/codi"}
    for size in (1, 2):
        parts, logged = step_of(tmp_path / str(size), case, size)
        largest = max(g.abs().max() for g in whole.values())
        assert whole.keys() == parts.keys() and largest > 1e-3
        for name, gradient in whole.items():
            assert (parts[name] - gradient).abs().max() <= 1e-4 * largest, name
        assert logged == pytest.approx(losses, rel=1e-5)


def test_rows_are_shuffled_where_trl_would(tmp_path):
    """By the seed, as datasets does it."""
    rows = Dataset.from_list(setups.ROWS)
    for each in (rows, rows.to_iterable_dataset()):
        found = setups.trainer(tmp_path, dataset=each, shuffle_dataset=True, seed=3).train_dataset
        plain = setups.trainer(tmp_path, dataset=each).train_dataset
        ids, wanted = ([row["question_ids"] for row in x] for x in (found, plain.shuffle(seed=3)))
        assert ids == wanted != [row["question_ids"] for row in plain]


@pytest.mark.parametrize("peft", [True, False])
def test_the_length_of_latent_inputs_is_logged_against_that_of_embeddings(tmp_path, peft):
    """By hand: each row's latents alone; root mean square of the embeddings' norms. 1e-4."""
    trainer = setups.trainer(tmp_path, peft=peft, max_steps=1, logging_steps=1, **setups.CASES["sequential"])
    batch = next(iter(trainer.get_train_dataloader()))
    backbone = backbone_of(trainer.model)
    norms = []
    for ids, mask in zip(batch["question_ids"], batch["question_mask"]):
        ids = ids[mask.bool()][None]
        norms.append(latent_phase(trainer.model, ids, torch.ones_like(ids)).latents.norm(dim=-1))
    rows = backbone.get_input_embeddings().weight.norm(dim=-1)
    trainer.model.train()
    with torch.no_grad():
        trainer.compute_loss(trainer.model, batch)
    found = trainer._metrics["train"]["latent/norm_ratio"][-1]
    assert found == pytest.approx((torch.cat(norms).mean() / rows.square().mean().sqrt()).item(), rel=1e-4)


@pytest.mark.parametrize("scale, warned", [(1.0, 0), (30.0, 1)])
def test_latent_inputs_that_grow_too_long_are_warned_of_once(tmp_path, caplog, scale, warned):
    trainer = setups.trainer(tmp_path, peft=False, max_steps=3, learning_rate=0.0, **setups.CASES["sequential"])
    norm = next(m for m in backbone_of(trainer.model).latent_projection.modules() if isinstance(m, torch.nn.LayerNorm))
    with torch.no_grad():
        norm.weight.mul_(
            scale * 2 * backbone_of(trainer.model).get_input_embeddings().weight.norm(dim=-1).mean() / 32**0.5
        )
    with caplog.at_level("WARNING"):
        trainer.train()
    ratios = [entry["latent/norm_ratio"] for entry in trainer.state.log_history if "latent/norm_ratio" in entry]
    assert len(ratios) == 3 and all((ratio > 10) == bool(warned) for ratio in ratios)
    assert sum("latent inputs are that many times" in r.getMessage() for r in caplog.records) == warned
