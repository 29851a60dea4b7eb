"""The curriculum of LOTUS and Coconut: its losses against plain ones, when its stages come, resuming, and refusals."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tests import tiny
from trl_ext import CoconutConfig, CoconutTrainer, LOTUSConfig, LOTUSTrainer
from trl_ext.latent.data import LatentTokenizer
from trl_ext.latent.stages import Stages
from unsloth_ext import LatentModel, backbone_of


# Steps of 2 to 9 tokens with the separator; one row has fewer steps than become latent, two have more
ROWS = [
    {"question": f"{a}+{b}=", "steps": steps, "answer": str(a + b)}
    for a in (1, 12, 3)
    for b, steps in (
        (1, ["1+2=3", "3"]),
        (22, ["7", "10+11=21", "5+5=10", "1=1", "2"]),
        (5, ["4+4=8", "9-1", "123+4"]),
        (6, ["88"]),
    )
]
KINDS = {
    "LOTUS": (LOTUSTrainer, LOTUSConfig, {"num_latents": 12, "latents_per_step": 4, "iterations": 2}),
    "Coconut": (CoconutTrainer, CoconutConfig, {"num_latents": 6, "latents_per_step": 2}),
    "SIM-CoT": (CoconutTrainer, CoconutConfig, {"num_latents": 6, "latents_per_step": 2, "w_step_decoder": 1.0}),
}


def trainer_of(folder, kind, family="qwen3", rows=ROWS, **changes):
    trainer, config, settings = KINDS[kind]
    settings = {"gradient_checkpointing": False, "answer_prompt": "##", "step_separator": ";", **settings, **changes}
    torch.manual_seed(0)
    return trainer(
        tiny.model(family, std=0.1),
        config(**tiny.short_run(folder, **settings)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tiny.tokenizer(()),
    )


def plain_losses(trainer, rows, stage):
    """Row by row from the texts, unpadded and without a cache: cross-entropy of what is written, and of the steps' tokens
    on the latent tokens, or of the steps on the step decoder's."""
    model, args, tokenizer = trainer.model, trainer.args, trainer.processing_class
    backbone = backbone_of(model)
    bot, latent, eot = backbone.latent_token_ids
    embed, head = backbone.get_input_embeddings(), model.get_output_embeddings()
    per_step = args.latents_per_step
    most = args.num_latents // per_step
    latent_steps = min(stage, most)
    count = latent_steps * per_step
    said, read, step_means = [], [], {}
    for row in rows:
        question = tokenizer(row["question"])["input_ids"]
        steps = [tokenizer(step + args.step_separator)["input_ids"] for step in row["steps"]]
        written = [] if stage > most else [token for step in steps[latent_steps:] for token in step]
        answer = tokenizer(args.answer_prompt)["input_ids"] + tokenizer(row["answer"])["input_ids"]
        answer = torch.tensor([[eot, *written, *answer, tokenizer.eos_token_id]])
        front = embed(torch.tensor([[*question, bot]]))
        if args.iterations is None:
            z = front[:, :0]
            for _ in range(count):
                last = backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state
                z = torch.cat([z, last[:, -1:]], dim=1)
        else:
            z = pad = embed(torch.full((1, count), latent))
            for _ in range(min(latent_steps, args.iterations)):
                z = pad + backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state[:, -count:]
        hidden = backbone(inputs_embeds=torch.cat([front, z, embed(answer)], dim=1)).last_hidden_state[0]
        start = front.shape[1]
        logits = head(hidden[start + count :])
        said.append(F.cross_entropy(logits[:-1], answer[0, 1:], reduction="none"))
        if args.w_step_decoder:
            rest = [token for step in steps[most - 1 :] for token in step]
            spans = [*steps[: most - 1], rest] if stage > most and rest else steps
            for k, step in enumerate(spans[:latent_steps]):
                labels = torch.tensor([*step, tokenizer.eos_token_id])
                given = torch.cat([z[0, k * per_step : (k + 1) * per_step], embed(labels)[:-1]])
                written = trainer._step_decoder(inputs_embeds=given[None]).logits[0, per_step - 1 :]
                step_means.setdefault(k, []).append(F.cross_entropy(written, labels, reduction="none"))
        for k, step in enumerate(steps[:latent_steps]):
            for i, token in enumerate(step[:per_step]):
                before = head(hidden[start + k * per_step + i - 1])
                read.append(F.cross_entropy(before, torch.tensor(token), reduction="none"))
    if args.w_step_decoder:  # a mean over steps of the means over their tokens
        return torch.cat(said).mean(), torch.stack([torch.cat(losses).mean() for losses in step_means.values()]).mean()
    return torch.cat(said).mean(), torch.stack(read).mean()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "kind, stage",
    [*(("LOTUS", n) for n in (1, 2, 3)), *(("Coconut", n) for n in (1, 2, 3, 4)), ("SIM-CoT", 2), ("SIM-CoT", 4)],
)
def test_each_stage_has_the_plain_loss_and_gradient(tmp_path, kind, family, stage):
    """Ragged, padded and cached, against single rows without either: 1e-5, gradients to 1e-5 of the largest (fp32)."""
    trainer = trainer_of(tmp_path, kind, family)
    trainer._enter_stage((stage - 1) * trainer.args.stage_epochs)
    model = trainer.model.eval()
    batch = trainer.data_collator([trainer._rows(row, i, "test") for i, row in enumerate(ROWS[:4])])
    loss = trainer.compute_loss(model, dict(batch))
    staged = trainer._in_stage(batch)
    at = staged["input_ids"].gather(1, staged["student_at"][:, None] + torch.arange(2))  # what L_CODI compares
    assert trainer.processing_class.batch_decode(at) == [f"#{row['answer'][0]}" for row in ROWS[:4]]
    said, read = plain_losses(trainer, ROWS[:4], stage)
    weight = trainer.args.w_step_decoder or trainer.args.w_latent_ce
    wanted = said + weight * read
    assert abs(loss - wanted) <= 1e-5
    assert trainer._metrics["eval"]["loss/ce_student"][-1] == pytest.approx(said.item(), abs=1e-5)
    assert ("loss/latent_ce" in trainer._metrics["eval"]) == (kind == "LOTUS")
    parameters = [p for p in trainer._named_trained().values() if p.requires_grad]
    ours, plain = (
        torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True) for x in (loss, wanted)
    )
    largest = max(g.abs().max() for g in plain)
    assert largest > 1e-2 and all((a - b).abs().max() <= 1e-5 * largest for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("drop", [False, True])
def test_stages_come_with_epochs(drop):
    stages = Stages(3, 2, 2, 0.5, drop)
    assert [stages.at(epoch) for epoch in (0, 0.49, 0.5 - 1e-9, 0.5, 1.0, 1.4, 1.5, 9)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        *[3 + drop] * 2,
    ]
    thinking = [stages.thinking(stage) for stage in (1, 2, 3, 4)]
    assert [found["num_latents"] for found in thinking] == [2, 4, 6, 6]
    assert [found["iterations"] for found in thinking] == [1, 2, 2, 2]
    assert Stages(3, 2, None, 0.5, drop).thinking(2)["iterations"] is None
    ends, lengths = [[3, 5], [2, 4, 9, 12, 20], [1]], np.array([5, 20, 1])
    # By stage: latent tokens and what is written; 2 + 18, 4 + 16, 6 + 11 in the second row
    assert stages.longest(ends, lengths).tolist() == [6, 20, 6]


class Watch(TrainerCallback):
    """What each step was trained with, and the optimizer's count of steps after it."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        config = backbone_of(model).latent_config
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        counts = {int(entry["step"]) for entry in optimizer.state.values()}
        self.seen.append((config.num_latents, config.iterations, *counts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_through_its_stages_and_resumes_exactly(tmp_path, kind):
    """12 rows in steps of 4: an epoch is 3 steps, a stage 2 of them. Resumed inside a stage and where one begins: every
    parameter and logged loss equal, bit for bit."""
    settings = {"max_steps": 8, "stage_epochs": 2 / 3, "save_strategy": "steps", "save_steps": 1}
    whole = trainer_of(tmp_path, kind, **settings)
    watch = Watch()
    whole.add_callback(watch)
    whole.train()
    if kind == "LOTUS":
        tokens = [(4, 1), (4, 1), (8, 2), (8, 2), *[(12, 2)] * 4]
        assert watch.seen == [(*pair, step) for step, pair in enumerate(tokens, 1)]
    else:
        assert watch.seen == [(n, None, step) for n in (2, 4, 6, 6) for step in (1, 2)]
    for step in (3, 4):
        again = trainer_of(tmp_path, kind, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        there = again._named_trained()
        for name, parameter in whole._named_trained().items():
            assert torch.equal(parameter, there[name]), (step, name)
        losses = [[e["loss"] for e in x.state.log_history if "loss" in e] for x in (whole, again)]
        assert losses[0] == losses[1]


def test_a_saved_model_thinks_as_in_its_stage(tmp_path):
    trainer = trainer_of(tmp_path, "LOTUS", max_steps=3, stage_epochs=2 / 3)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    saved = json.loads((tmp_path / "final" / "config.json").read_text())["latent"]
    assert saved["num_latents"] == 8 and saved["iterations"] == 2 and saved["feedback_onto"] == "embedding"
    model = LatentModel.from_pretrained(str(tmp_path / "final"))
    assert backbone_of(model.model).latent_config == backbone_of(trainer.model).latent_config
    longer = trainer_of(tmp_path, "LOTUS", max_steps=1).train  # a run of its own begins with the first stage
    assert longer().global_step == 1


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """One step on eight rows, eight or two at a time: gradients to 1e-4 of the largest, losses to 1e-5."""
    found = []
    for size in (8, 2):
        gradients = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, *_, model, kept=gradients, **__):
                kept.update({name: p.grad.clone() for name, p in model.named_parameters()})

        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        trainer = trainer_of(tmp_path, "LOTUS", rows=ROWS[:8], max_grad_norm=0.0, **steps)
        trainer.add_callback(Keep())
        trainer.train()
        found.append((gradients, {k: v for k, v in trainer.state.log_history[0].items() if k.startswith("loss")}))
    (whole, losses), (parts, logged) = found
    largest = max(g.abs().max() for g in whole.values())
    assert logged == pytest.approx(losses, rel=1e-5) and {"loss/ce_student", "loss/latent_ce"} <= losses.keys()
    assert largest > 1e-3 and all((parts[n] - g).abs().max() <= 1e-4 * largest for n, g in whole.items())


def test_a_token_belongs_to_the_step_of_its_last_character():
    """Of a byte-level BPE, " <<" begins with the separator."""
    vocab = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "1", "+", "Ġ", "<", "<<", "Ġ<<"])}
    backend = Tokenizer(models.BPE(vocab, [("<", "<"), ("Ġ", "<<")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    steps = ["<<1+", "<<1", "1+1"]
    row = {"question": "1+1", "steps": steps, "answer": "1"}
    found = LatentTokenizer(tokenizer, "", " ", False, None, step_ends=True)(row, 0, "test")
    pieces = tokenizer.convert_ids_to_tokens(found["trace_ids"])
    assert pieces == ["<<", "1", "+", "Ġ<<", "1", "Ġ", "1", "+", "1", "Ġ"]
    assert found["step_ends"] == [3, 6, 10]


def test_latent_tokens_of_results_stand_for_what_follows_the_last_equals_sign(tmp_path):
    """Two latent tokens for each of two steps: `1=1+9=10` has the result `10`, and `;` ends a shorter one."""
    rows = [
        {"question": "1+1=", "steps": ["1+1=2", "1=1+9=10", "3=3"], "answer": "3"},
        {"question": "12+3=", "steps": ["12+3=150"], "answer": "5"},
        {"question": "1-5=", "steps": ["=7", "1+1= 2", "4=4", "5=5"], "answer": "4"},
    ]
    settings = {"stage_epochs": 0.0, "num_latents": 4, "latents_per_step": 2, "latent_ce_tokens": "results"}
    trainer = trainer_of(tmp_path, "LOTUS", rows=rows, drop_last_step=False, **settings)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    asked = trainer._targets(batch)
    read = [
        [tiny.tokenizer(()).decode([i for i in block if i >= 0]) for block in row.view(2, 2).tolist()] for row in asked
    ]
    assert read == [["2;", "10"], ["15", ""], ["7;", "2;"]]
    trainer.train()
    assert any("loss/latent_ce" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"stage_epochs": 0.0, "latents_per_step": None, "latent_ce_tokens": "results"}, "latent_ce_tokens='results'"),
        ({"latents_per_step": 5}, "latents_per_step=5: must be at least 1, and divide num_latents=12"),
        (
            {"latents_per_step": None},
            "latent_ce_tokens='steps': latent tokens must belong to steps; set latents_per_step",
        ),
        ({"stage_epochs": -1.0}, "stage_epochs=-1.0: must be 0 or more"),
        ({"stage_epochs": 0.0, "reset_optimizer": True}, "reset_optimizer=True: there are no stages; set stage_epochs"),
        ({"w_kv": 1.0}, "w_kv=1.0: L_KV compresses all steps into the latent tokens; set one of them to 0"),
        ({"feedback_onto": "itself"}, "feedback_onto='itself': choose one of previous, embedding"),
        ({"feedback_residual": False}, "feedback_onto='embedding': nothing is added; set feedback_residual=True"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        trainer_of(tmp_path, "LOTUS", **changes)


def test_rows_that_fit_no_position_table_are_named(tmp_path):
    """gpt2's has 128: row 1 has 42 tokens of steps, and 72 latent tokens beside a part of them."""
    trainer_of(tmp_path, "LOTUS", "gpt2", num_latents=72, latents_per_step=24)
    with pytest.raises(
        ValueError, match=r"row \d+: more tokens, latent tokens included, than the model's 128 positions"
    ):
        trainer_of(tmp_path, "LOTUS", "gpt2", num_latents=120, latents_per_step=40)
