"""LOTUS and Coconut against golden tensors of their official code, with the same weights and rows.

`tests/golden/official_stages.py` made them. In float32 losses agree to 1e-5, logits and latent inputs to 1e-5 of the
largest, and gradients to 1e-4 of the largest of the same parameter. The settings are those of the presets, with fewer
latent tokens.
"""

import functools

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from tests import tiny
from tests.golden.load import load
from tests.golden.official_stages import CASES, MODELS, PER_STEP, ROWS, STEPS, tokenizer, untrained
from trl_ext import CoconutConfig, CoconutTrainer, LOTUSConfig, LOTUSTrainer
from unsloth_ext import backbone_of
from unsloth_ext.latent.phase import latent_phase


KINDS = {
    "coconut": (CoconutTrainer, CoconutConfig, {"gpt2": "coconut-gpt2", "llama": "coconut-gpt2"}),
    "lotus": (LOTUSTrainer, LOTUSConfig, {"gpt2": "lotus-gpt2", "llama": "lotus-llama-3b"}),
}
golden = functools.cache(load)


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    """A function from a model, a method and a stage to a trainer in that stage, with the weights of the golden file."""

    @functools.cache
    def made(kind, method):
        trainer, config, presets = KINDS[method]
        settings = tiny.short_run(
            tmp_path_factory.mktemp(f"{kind}_{method}"),
            num_latents=STEPS * PER_STEP[method],
            latents_per_step=PER_STEP[method],
            gradient_checkpointing=False,
        )
        model = untrained(kind)
        for name, weight in model.named_parameters():
            weight.data.copy_(golden(f"official_stages_{kind}")[0][f"w.{name}"])
        rows = Dataset.from_list(ROWS["ragged"])
        args = config.preset(presets[kind], **settings)
        return trainer(model, args, train_dataset=rows, processing_class=tokenizer())

    def of(kind, method, stage):
        found = made(kind, method)
        found._enter_stage((stage - 1) * found.args.stage_epochs)
        return found

    return of


def batch_of(trainer, rows):
    """Rows as the official dataset reads them: a line break ends the question, and a space begins the answer."""
    rows = [{**row, "question": row["question"] + "\n", "answer": " " + row["answer"]} for row in rows]
    return trainer.data_collator([trainer._rows(row, i, "test") for i, row in enumerate(rows)])


def case_of(kind, method, rows, stage):
    """The tensors of one case."""
    tensors, _ = golden(f"official_stages_{kind}")
    prefix = f"{method}.{rows}.{stage}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def close(ours, official, tolerance=1e-5):
    assert ours.shape == official.shape
    assert (ours - official).abs().max() <= tolerance * official.abs().max()


def one_text(trainer, batch):
    """What the model reads of each row, with `<latent>` for its latent tokens, and the labels of it."""
    bot, latent, _ = backbone_of(trainer.model).latent_token_ids
    staged = trainer._in_stage(batch)
    for i in range(len(staged["input_ids"])):
        question = staged["question_ids"][i][staged["question_mask"][i].bool()].tolist()
        real = staged["attention_mask"][i].bool()
        read = [*question, bot, *[latent] * trainer._num_latents]
        yield read + staged["input_ids"][i][real].tolist(), [-100] * len(read) + staged["labels"][i][real].tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("kind", MODELS)
def test_a_stage_is_the_official_one(trainer_of, kind, case):
    method, rows, stage = case
    trainer, official = trainer_of(kind, method, stage), case_of(kind, *case)
    model, batch = trainer.model.train(), batch_of(trainer, ROWS[rows])

    mask = official["in.attention_mask"].bool()
    for i, (ids, labels) in enumerate(one_text(trainer, batch)):
        assert ids == official["in.input_ids"][i, mask[i]].tolist()
        assert labels == official["in.labels"][i, mask[i]].tolist()

    seen = []
    hook = backbone_of(model).register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs.get("inputs_embeds")), with_kwargs=True
    )
    loss, out = trainer.compute_loss(model, dict(batch), return_outputs=True)
    hook.remove()
    inputs = [x for x in seen if x is not None]  # the other passes read ids
    close(torch.cat(inputs, dim=1) if method == "coconut" else torch.stack(inputs), official["mid.latents"])

    staged = trainer._in_stage(batch)
    lengths, answers = staged["attention_mask"].sum(1), staged["answer_mask"].sum(1)
    rows_of = zip(out.logits, lengths.tolist(), answers.tolist(), strict=True)
    close(torch.cat([logits[end - n - 1 : end - 1] for logits, end, n in rows_of]), official["out.logits"])

    if method == "lotus":
        losses = trainer._metrics["train"]
        assert losses["loss/ce_student"][-1] == pytest.approx(official["out.main_loss"].item(), rel=1e-5)
        if rows == "long":  # its steps do not fit their blocks: see the next test
            return
        assert losses["loss/latent_ce"][-1] == pytest.approx(official["out.intermediate_loss"].item(), rel=1e-5)
    assert loss.item() == pytest.approx(official["out.loss"].item(), rel=1e-5)
    if rows == "ragged":
        names, parameters = zip(*model.named_parameters(), strict=True)
        assert {f"grad.{name}" for name in names} == {name for name in official if name.startswith("grad.")}
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            close(gradient, official[f"grad.{name}"], 1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_steps_longer_than_their_block_are_cut(trainer_of, kind):
    """Here a slot stands for one token at most. In the official code the rest of a step goes on into the slots of the next
    block, which then stand for two tokens. What goes past the output of the last slot is left out, but counted. To 1e-5."""
    stage = 2
    trainer, official = trainer_of(kind, "lotus", stage), case_of(kind, "lotus", "long", stage)
    model, per_step = trainer.model.train(), PER_STEP["lotus"]
    batch = batch_of(trainer, ROWS["long"])
    with torch.no_grad():
        state = latent_phase(model, batch["question_ids"], batch["question_mask"])
        logits = model.get_output_embeddings()(torch.cat([state.before[-1], state.hidden_states[:, -1:]], dim=1))
        trainer.compute_loss(model, dict(batch))
    theirs, ours, tokens = [], [], 0
    for row, said in zip(ROWS["long"], logits, strict=True):
        for k, step in enumerate(row["steps"][:stage]):
            ids = torch.tensor(tokenizer()(step + "\n")["input_ids"])
            there = said[k * per_step :][: len(ids)]
            losses = F.cross_entropy(there, ids[: len(there)], reduction="none")
            theirs.append(losses)
            ours.append(losses[:per_step])
            tokens += len(ids)
    theirs = torch.cat(theirs)
    assert len(theirs) < tokens
    assert (theirs.sum() / tokens).item() == pytest.approx(official["out.intermediate_loss"].item(), rel=1e-5)
    found = trainer._metrics["train"]["loss/latent_ce"][-1]
    assert found == pytest.approx(torch.cat(ours).mean().item(), rel=1e-5)
    assert abs(found - official["out.intermediate_loss"]) > 1e-2
