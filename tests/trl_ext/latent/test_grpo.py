"""GRPO after latent tokens: log-probabilities against plain ones, the ratio, resuming, off, saving, and refusals."""

import pytest
import torch
import trl
from tokenizers.processors import TemplateProcessing

from tests import tiny
from tests.trl_ext.hrpo.setups import arguments, base_folder, losses, parameters, prompts, reward_digits
from trl_ext.latent import grpo as grpo_module
from trl_ext.latent.grpo import LatentGRPOConfig, LatentGRPOTrainer, alike
from unsloth_ext import LatentModel, backbone_of
from unsloth_ext.latent.model import question_batch

from .setups import THINKING, grpo, thinking_model


def batch_of(trainer):
    """Questions of different lengths, some twice, with completions of different lengths: ids, mask, C."""
    questions = [[3, 4, 5], [6, 7, 8, 9, 10], [3, 4, 5], [11]]
    answers = [[20, 21, 22], [23, 1], [24, 25, 1], [26]]
    left, right = max(map(len, questions)), max(map(len, answers))
    rows = list(zip(questions, answers, strict=True))
    ids = [[0] * (left - len(q)) + q + a + [0] * (right - len(a)) for q, a in rows]
    mask = [[0] * (left - len(q)) + [1] * len(q + a) + [0] * (right - len(a)) for q, a in rows]
    return rows, torch.tensor(ids), torch.tensor(mask), right


def plain_log_probs(trainer, rows):
    """Row by row from the ids, unpadded and without a cache."""
    model = trainer.model
    backbone = backbone_of(model)
    config, (bot, latent, eot) = backbone.latent_config, backbone.latent_token_ids
    embed, head, count = backbone.get_input_embeddings(), model.get_output_embeddings(), config.num_latents
    project = getattr(backbone, "latent_projection", lambda h: h)
    found = []
    for question, answer in rows:
        front = embed(torch.tensor([[*question, bot]]))

        def states(z, front=front):
            return backbone(inputs_embeds=torch.cat([front, z], dim=1)).last_hidden_state

        if config.iterations is None:
            z = front[:, :0]
            for _ in range(count):
                z = torch.cat([z, project(states(z)[:, -1:])], dim=1)
        else:
            z = pad = embed(torch.full((1, count), latent))
            for t in range(config.iterations):
                if config.update == "own":
                    z = pad + states(z)[:, -count:]
                else:
                    new = project(states(z)[:, -count - 1 : -1])
                    z = new if t == 0 else torch.cat([z[:, :1], new[:, 1:]], dim=1)
        said = embed(torch.tensor([[eot, *answer]]))
        logits = head(states(torch.cat([z, said], dim=1))[0, -len(answer) - 1 : -1]) / trainer.temperature
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    "kind, family", [(kind, "qwen3") for kind in THINKING] + [("CODI", f) for f in ("llama", "qwen2", "gpt2")]
)
def test_log_probs_and_gradients_are_the_plain_ones(tmp_path, kind, family):
    """Ragged, padded, cached, each question thought about once, against single rows: 1e-4 (logits of about 10, fp32),
    gradients to 1e-4 of the largest."""
    trainer = grpo(tmp_path, family, kind, temperature=0.7)
    model = trainer.model.eval()
    rows, ids, mask, length = batch_of(trainer)
    real = mask[:, -length:].bool()
    for size in (None, 1):
        ours = trainer._get_per_token_logps_and_entropies(model, ids, mask, length, size)[0]
        plain = plain_log_probs(trainer, rows)
        assert ours.shape == real.shape and (ours[real] - plain).abs().max() <= 1e-4
        weights = torch.linspace(-1, 2, len(plain))
        parameters_ = list(model.parameters())
        grads = [
            torch.autograd.grad((x * weights).sum(), parameters_, materialize_grads=True) for x in (ours[real], plain)
        ]
        largest = max(g.abs().max() for g in grads[1])
        assert all((a - b).abs().max() <= 1e-4 * largest for a, b in zip(*grads, strict=True))
    if kind == "CODI":
        at = [name for name, _ in model.named_parameters()].index(
            next(name for name, _ in model.named_parameters() if "latent_projection" in name)
        )
        assert grads[0][at].abs().max() > 1e-3 * largest  # the latent tokens are trained


def test_a_completion_has_the_probability_it_was_drawn_with(tmp_path, monkeypatch):
    """What `generate` scored is what the loss computes: 1e-4 (logits of about 10, fp32)."""
    trainer, drawn, seen = grpo(tmp_path, max_steps=1, learning_rate=0.0), [], {}
    stock, loss = grpo_module.latent_generate, trainer._compute_loss

    def scoring(*args, **kwargs):
        out = stock(*args, **kwargs, return_dict_in_generate=True, output_logits=True)
        ids = out.sequences[:, -len(out.logits) :]
        log_probs = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        drawn.extend(zip(ids.tolist(), log_probs, strict=True))
        return out.sequences

    def keep(model, inputs):
        seen.update(inputs)
        return loss(model, inputs)

    monkeypatch.setattr(grpo_module, "latent_generate", scoring)
    trainer._compute_loss = keep
    trainer.train()
    ids = torch.cat([seen["prompt_ids"], seen["completion_ids"]], dim=1)
    mask = torch.cat([seen["prompt_mask"], seen["completion_mask"]], dim=1)
    with torch.no_grad():
        ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, seen["completion_ids"].shape[1])[0]
    assert len(drawn) == len(ours) == 8
    for completion, real, found in zip(seen["completion_ids"], seen["completion_mask"].bool(), ours, strict=True):
        written = completion[real].tolist()
        (scores,) = (log_probs for row, log_probs in drawn if row[: len(written)] == written)
        assert (found[real] - scores[: len(written)]).abs().max() <= 1e-4


def test_a_question_has_the_tokens_of_evaluation(tmp_path, monkeypatch):
    """Also with a tokenizer that ends each text with EOS."""
    trainer, seen = grpo(tmp_path, max_steps=1), []
    tokenizer, generate = trainer.processing_class, trainer._generate_single_turn
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )

    def keep(prompt_ids, *args, **kwargs):
        seen.extend(prompt_ids)
        return generate(prompt_ids, *args, **kwargs)

    monkeypatch.setattr(trainer, "_generate_single_turn", keep)
    trainer.train()
    batch = question_batch(tokenizer, tokenizer.batch_decode(seen))
    ids = [row[real].tolist() for row, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    assert len(seen) == 8 and seen == ids and all(row[-1] != tokenizer.eos_token_id for row in seen)


@pytest.mark.parametrize("kind", THINKING)
def test_the_ratio_is_one_at_the_first_inner_step(tmp_path, kind):
    """Exactly; at the second it is not."""
    trainer = grpo(tmp_path, kind=kind, num_iterations=2, max_steps=2)
    ratios = []
    loss = trainer._compute_loss

    def watch(model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            new = trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]
        ratios.append(((new - inputs["old_per_token_logps"]) * inputs["completion_mask"]).abs().max().item())
        return loss(model, inputs)

    trainer._compute_loss = watch
    trainer.train()
    assert ratios[0] == 0 and ratios[1] > 1e-3
    assert all(entry["latent/norm_ratio"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("peft", [True, False])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, peft):
    """Resumed at step 3 of 6, inside a rollout: bit for bit."""
    settings = {"max_steps": 6, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3, "peft": peft}
    whole = grpo(tmp_path, **settings)
    start = parameters(whole)
    whole.train()
    moved = {name for name, p in parameters(whole).items() if not torch.equal(p, start[name])}
    assert any("latent_projection" in name for name in moved)
    again = grpo(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(whole) == losses(again)
    there = parameters(again)
    assert all(torch.equal(p, there[name]) for name, p in parameters(whole).items())


def test_off_it_is_trls_trainer_bit_for_bit(tmp_path):
    runs = []
    for trainer, config, more in (
        (trl.GRPOTrainer, trl.GRPOConfig, {"gradient_checkpointing": False}),
        (LatentGRPOTrainer, LatentGRPOConfig, {"thinking": False, "beta": 0.0}),
    ):
        torch.manual_seed(0)
        args = arguments(config, tmp_path / config.__name__, **more)
        made = trainer(base_folder(tmp_path), reward_digits, args, train_dataset=prompts())
        made.train()
        runs.append((losses(made), parameters(made)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, runs[1][1][name]) for name, p in runs[0][1].items())


@pytest.mark.parametrize("peft", [True, False])
def test_a_trained_model_is_loaded_by_name_and_trained_further(tmp_path, peft):
    model, tokenizer = thinking_model()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    name = str(tmp_path / "base")
    first = grpo(tmp_path / "first", model=name, peft=peft, max_steps=2)
    first.train()
    first.save_model(str(tmp_path / "final"))
    saved = LatentModel.from_pretrained(str(tmp_path / "final"))
    questions = ["1+2=", "3+4+5="]
    ours = LatentModel(first.model, first.processing_class).generate(questions, max_new_tokens=6)
    assert saved.generate(questions, max_new_tokens=6) == ours
    again = grpo(tmp_path / "second", model=saved.model, max_steps=1)
    before = parameters(again)
    again.train()
    assert any(not torch.equal(p, before[name]) for name, p in parameters(again).items())


def test_equal_neighbours_are_found():
    ids = torch.tensor([[0, 1], [0, 1], [5, 1], [5, 1], [0, 1], [0, 1]])
    mask = torch.ones_like(ids)
    first, size = alike(ids, mask)
    assert first.tolist() == [0, 2, 4] and size == 2
    mask[1, 0] = 0  # a pad has any id
    first, size = alike(ids, mask)
    assert first.tolist() == [0, 1, 2, 3, 4, 5] and size == 1
    assert alike(ids[:1], mask[:1]) == (torch.tensor([0]), 1)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta": 0.1}, "beta=0.1: the reference model of the KL term would answer without latent tokens; only 0.0"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True: transformers drops the cache with it"),
        ({"use_vllm": True}, "use_vllm=True: latent tokens are made by transformers"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
    ],
)
def test_what_does_not_work_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        grpo(tmp_path, **changes).train()


def test_models_and_arguments_that_cannot_think_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="has no latent tokens: train it with CODI, PCCoT, KaVa, LOTUS or Coconut first"
    ):
        grpo(tmp_path, model=tiny.model())
    with pytest.raises(ValueError, match="has no settings of the method latent"):
        grpo(tmp_path, model=base_folder(tmp_path))
    with pytest.raises(ValueError, match="args is a GRPOConfig; GRPO after latent tokens needs a LatentGRPOConfig"):
        LatentGRPOTrainer(
            thinking_model()[0], reward_digits, arguments(trl.GRPOConfig, tmp_path), train_dataset=prompts()
        )
    with pytest.raises(ValueError, match="rollout_func: a completion is one text after latent tokens; leave it out"):
        LatentGRPOTrainer(
            thinking_model()[0],
            reward_digits,
            arguments(LatentGRPOConfig, tmp_path),
            train_dataset=prompts(),
            rollout_func=print,
        )
