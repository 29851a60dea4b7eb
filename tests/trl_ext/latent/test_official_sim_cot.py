"""SIM-CoT's decoder against golden tensors of its official code, with the same weights and rows.

`tests/golden/official_sim_cot.py` made them. In float32 losses agree to 1e-5, and gradients to 1e-4 of the largest of the
same parameter. The settings are those of the presets, with fewer latent tokens. Where the official code does something
else, as docs/latent.md says, a test makes its numbers from our parts.
"""

import functools

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.golden.load import load
from tests.golden.official_sim_cot import (
    BOT,
    COCONUT_ROWS,
    CODI_ROWS,
    EOS,
    EOT,
    LATENTS,
    MODELS,
    PER_STEP,
    STAGES,
    STEPS,
    WHOLE,
    tokenizer,
    untrained,
)
from trl_ext import CoconutConfig, CoconutTrainer, CODIConfig, CODITrainer
from unsloth_ext import backbone_of
from unsloth_ext.latent.phase import latent_phase


golden = functools.cache(load)
NO = -100
BREAK = tokenizer()("\n")["input_ids"]
# In the official order. With CODI <latent> has a row of its own, which is not read; with Coconut pads are end tokens
TOKENS = {
    "codi": {"pad_token": "<pad>", "additional_special_tokens": ["<bot>", "<eot>", "<latent>"]},
    "coconut": {"pad_token": "<eos>", "additional_special_tokens": ["<latent>", "<bot>", "<eot>"]},
}


def case_of(kind, case):
    """The tensors of one case."""
    tensors, _ = golden(f"official_sim_cot_{kind}")
    return {name.removeprefix(f"{case}."): x for name, x in tensors.items() if name.startswith(f"{case}.")}


def codi_rows(rows):
    """The space that the official code puts between steps begins the later one."""
    return [{**row, "steps": [row["steps"][0], *(" " + step for step in row["steps"][1:])]} for row in rows]


def coconut_rows(rows):
    """As the official dataset reads them: a line break ends the question, and a space begins the answer."""
    return [{**row, "question": row["question"] + "\n", "answer": " " + row["answer"]} for row in rows]


def padded(groups):
    """Lists of tokens of each row and group: (B, G, L), -100 after the end."""
    longest = max(len(ids) for row in groups for ids in row)
    return torch.tensor([[ids + [NO] * (longest - len(ids)) for ids in row] for row in groups])


def tokens(steps):
    """The lists of tokens in (B, G, L)."""
    return [[ids[ids != NO].tolist() for ids in row] for row in steps]


def official_tokens(official):
    """The lists of tokens that the official code writes, by row and group."""
    groups = [official[f"in.targets.{k}"] for k in range(len(official["out.step_losses"]))]
    return [[ids[ids != NO].tolist() for ids in row] for row in zip(*groups, strict=True)]


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    """A function from a model and a method to a trainer with the weights of the golden file, and the step decoder alone in
    its loss."""

    @functools.cache
    def made(kind, method):
        of = tokenizer()
        of.add_special_tokens(TOKENS[method])
        assert of.convert_tokens_to_ids(["<bot>", "<eot>"]) == [BOT, EOT]
        settings = tiny.short_run(
            tmp_path_factory.mktemp(f"{kind}_{method}"),
            gradient_checkpointing=False,
            w_student=0.0,
            w_codi=0.0,
            w_teacher=0.0,
        )
        if method == "codi":
            trainer, rows = CODITrainer, codi_rows(WHOLE)
            settings |= {"num_latents": LATENTS, "projection_dim": 16, "step_separator": "", "answer_prompt": "#"}
            args = CODIConfig.preset({"gpt2": "sim-cot-gpt2", "llama": "sim-cot-llama-1b"}[kind], **settings)
        else:
            trainer, rows = CoconutTrainer, coconut_rows(COCONUT_ROWS)
            settings |= {"num_latents": STEPS * PER_STEP, "latents_per_step": PER_STEP}
            args = CoconutConfig.preset("sim-cot-coconut-gpt2", **settings)
        found = trainer(untrained(kind), args, train_dataset=Dataset.from_list(rows), processing_class=of)
        for name, ours in parameters_of(found).items():
            theirs = as_read(found, name, golden(f"official_sim_cot_{kind}")[0][f"w.{name}"])
            ours.data[: len(theirs)].copy_(theirs)
        found.model.set_attn_implementation("eager")  # fully masked rows differ under SDPA
        return found

    return made


def parameters_of(trainer):
    """Our parameters by their official names: of the model, the projection and the decoder."""
    found = {f"decoder.{name}": x for name, x in trainer._step_decoder.named_parameters()}
    for name, x in trainer.model.named_parameters():
        _, projects, inside = name.partition("latent_projection.")
        found[f"prj.{inside.replace('4.', 'ln.')}" if projects else f"model.{name}"] = x
    return found


def as_read(trainer, name, x):
    """An official parameter, or its gradient, in our order. Coconut's decoder counts positions from 1, ours from 0."""
    shifted = isinstance(trainer, CoconutTrainer) and name == "decoder.transformer.wpe.weight"
    return x.roll(-1, 0) if shifted else x


def batch_of(trainer, rows):
    return trainer.data_collator([trainer._rows(row, i, "test") for i, row in enumerate(rows)])


def check_gradients(trainer, loss, official):
    """Of all parameters: 1e-4 of the largest of each. An LM head of the model alone has none."""
    parameters = parameters_of(trainer)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: x for name, x in zip(parameters, found, strict=True) if x is not None}
    theirs = {name.removeprefix("grad."): x for name, x in official.items() if name.startswith("grad.")}
    assert gradients.keys() == theirs.keys()
    for name, x in theirs.items():
        ours, rest = gradients[name][: len(x)], gradients[name][len(x) :]
        assert (ours - as_read(trainer, name, x)).abs().max() <= 1e-4 * x.abs().max(), name
        assert not rest.any()


@pytest.mark.parametrize("kind", MODELS)
def test_codi_is_the_official_one(trainer_of, kind):
    """Rows with more, as many and fewer steps than there are latent inputs, and with none."""
    trainer, official = trainer_of(kind, "codi"), case_of(kind, "codi.whole")
    batch = batch_of(trainer, codi_rows(WHOLE))
    bot = batch["question_ids"].new_full((len(WHOLE), 1), BOT)
    assert torch.cat([batch["question_ids"], bot], dim=1).tolist() == official["in.encoder_input_ids"].tolist()
    assert tokens(trainer._steps(batch)) == official_tokens(official)
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(official["out.step_loss"].item(), rel=1e-5)
    state = latent_phase(trainer.model, batch["question_ids"], batch["question_mask"])
    by_step = trainer._write_steps(trainer._step_decoder, trainer.model, state, batch)
    assert by_step.tolist() == pytest.approx(official["out.step_losses"].tolist(), rel=1e-5)
    check_gradients(trainer, loss, official)


@pytest.mark.parametrize("kind", MODELS)
def test_the_official_codi_cuts_steps_by_the_first_row_of_a_batch(trainer_of, kind, monkeypatch):
    """In the official code a step ends at the latest one token after that of the first row. Here all steps are whole."""
    trainer, official = trainer_of(kind, "codi"), case_of(kind, "codi.cut")
    batch = batch_of(trainer, codi_rows(CODI_ROWS["cut"]))
    whole = tokens(trainer._steps(batch))
    cut = [[ids[: len(first) + 1] for ids, first in zip(row, whole[0], strict=True)] for row in whole]
    assert cut == official_tokens(official) and cut != whole
    monkeypatch.setattr(trainer, "_steps", lambda _: padded(cut))
    loss = trainer.compute_loss(trainer.model.train(), batch).item()
    assert loss == pytest.approx(official["out.step_loss"].item(), rel=1e-5)
    monkeypatch.undo()
    whole_loss = case_of(kind, "codi.whole")["out.step_loss"].item()  # of the same rows in another order
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(whole_loss, rel=1e-5)
    assert abs(loss - whole_loss) > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_the_official_codi_attends_pads_and_counts_them(trainer_of, kind, monkeypatch):
    """The official latent tokens see left pads, and positions count them. Here a row is the same alone and in a batch. No
    row has a third step, so it is not in the mean."""
    trainer, official = trainer_of(kind, "codi"), case_of(kind, "codi.padded")
    batch, model = batch_of(trainer, codi_rows(CODI_ROWS["padded"])), trainer.model.train()
    groups = tokens(trainer._steps(batch))
    assert [row[:2] for row in groups] == official_tokens(official) and not any(row[2] for row in groups)
    ours = trainer.compute_loss(model, batch).item()

    def counting_pads(_, args, inputs):
        length = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs).shape[1]
        rows, until = inputs["attention_mask"].shape
        inputs["position_ids"] = torch.arange(until - length, until).expand(rows, -1)
        return args, inputs

    def official_phase(*args, **keywords):
        hook = backbone_of(model).register_forward_pre_hook(counting_pads, with_kwargs=True)
        state = latent_phase(*args, **keywords, attend_pads=True)
        hook.remove()
        return state

    monkeypatch.setattr("trl_ext.latent.trainer.latent_phase", official_phase)
    theirs = trainer.compute_loss(model, batch).item()
    assert theirs == pytest.approx(official["out.step_loss"].item(), rel=1e-5)
    assert abs(theirs - ours) > 1e-3


def as_coconut_writes(steps):
    """The official lists of tokens: without the line break that ends a step, and the answer in place of a missing step."""
    of = tokenizer()
    answers = [[*of("### " + row["answer"])["input_ids"], EOS] for row in COCONUT_ROWS]
    ended = [[[*ids[:-2], EOS] if ids[-2:] == [*BREAK, EOS] else ids for ids in row] for row in tokens(steps)]
    return [[ids or answer for ids in row] for row, answer in zip(ended, answers, strict=True)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_coconut_is_the_official_one_with_its_steps_and_mean(trainer_of, kind, stage, monkeypatch):
    """The official loss of a step is the sum over its tokens and the mean over rows; here it is the mean over tokens. The
    official decoder counts positions from 1; here from 0, so its table is shifted (`as_read`)."""
    trainer, official = trainer_of(kind, "coconut"), case_of(kind, f"coconut.{stage}")
    trainer._enter_stage((stage - 1) * trainer.args.stage_epochs)
    batch, model, rows = batch_of(trainer, coconut_rows(COCONUT_ROWS)), trainer.model.train(), len(COCONUT_ROWS)
    plain = trainer.compute_loss(model, dict(batch)).item()
    student = trainer._metrics["train"]["loss/ce_student"][-1]
    assert student == pytest.approx(official["out.main_loss"].item(), rel=1e-5)

    written = as_coconut_writes(trainer._steps(batch))
    assert written == official_tokens(official)
    monkeypatch.setattr(trainer, "_steps", lambda _: padded(written))
    state = latent_phase(model, batch["question_ids"], batch["question_mask"])
    by_step = trainer._write_steps(trainer._step_decoder, model, state, batch)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(by_step.mean().item(), rel=1e-5)
    sums = by_step * (padded(written) != NO).sum((0, 2))
    assert sums.tolist() == pytest.approx(official["out.step_losses"].tolist(), rel=1e-5)
    loss = sums.mean() / rows
    assert loss.item() == pytest.approx(official["out.step_loss"].item(), rel=1e-5)
    assert loss.item() > 2 * plain
    if any(name.startswith("grad.") for name in official):
        check_gradients(trainer, loss, official)
