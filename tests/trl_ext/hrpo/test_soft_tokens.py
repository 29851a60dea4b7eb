"""HRPOTrainer with soft tokens: what its ratio, its gradient, its files and its refusals are."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.processes import launch
from trl_ext import HRPOConfig
from trl_ext.hrpo.monitors import log_ratio
from unsloth_ext import DelimiterMatcher, FastThinkingModel, attach_thinking, hybrid_generate
from unsloth_ext.hrpo.residual import ThinkingConfig
from unsloth_ext.hrpo.soft_tokens import SOFT_FIELDS, first_plain
from unsloth_ext.hrpo.states import SOFT_SOURCES

from . import setups
from .test_log_probs import whole
from .test_resume import SAVING, checkpoint
from .test_trainer import one_batch


def soft(tmp_path, source, **changes):
    return setups.hrpo(tmp_path, thinking_source=source, recompute="frozen", **changes)


@pytest.mark.parametrize("likelihood", ["sum", "mean"])
@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_the_ratio_is_1_at_the_first_inner_step(tmp_path, source, likelihood):
    """max |log ratio| <= 1e-5 in fp32, with 32 dimensions; left padding, ragged rows, all kinds of tokens."""
    trainer = soft(tmp_path, source, temperature=0.8, noise_likelihood=likelihood, num_generations=4)
    torch.manual_seed(5)
    inputs = one_batch(trainer)
    mask, live = inputs["thinking_mask"], inputs["completion_mask"].bool()
    assert (inputs["prompt_mask"] == 0).any() and mask.any() and (first_plain(mask) & live).any()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    found = trainer._metrics["train"]
    assert found["thinking/log_ratio"][0] <= 1e-5 and found["thinking/ratio_deviation"][0] <= 1e-5
    # Tokens do not count
    shifted = {**inputs, "rollout_logps": inputs["rollout_logps"] + (~mask).float()}
    trainer._compute_loss(trainer.model, shifted)
    assert found["thinking/log_ratio"][0] <= 1e-5 and found["thinking/ratio_deviation"][0] > 0.1
    # Other noise is another action
    name = "thinking_states" if source == "soft_gaussian" else "gumbels"
    trainer._compute_loss(trainer.model, {**inputs, name: inputs[name] + 0.1 * mask[..., None]})
    assert found["thinking/log_ratio"][0] > 1e-3


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_the_gradient_of_the_loss_is_reinforce(tmp_path, source):
    """Against a stock model: advantages times likelihoods, written as in the papers, over the row's tokens. 1e-3 of the
    largest entry."""
    trainer = soft(tmp_path, source, peft=False, loss_type="grpo")
    torch.manual_seed(5)
    inputs = one_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs).backward()
    stock = tiny.model("qwen3", std=0.1)
    ids, attention, length = whole(inputs)
    mask, live = inputs["thinking_mask"], inputs["completion_mask"].bool()
    table = stock.get_input_embeddings().weight
    embeds = torch.nn.functional.embedding(ids, table)
    # What was fed is an action, or made of one, and has no gradient
    embeds = torch.cat(
        [embeds[:, :-length], torch.where(mask[..., None], inputs["thinking_states"], embeds[:, -length:])], dim=1
    )
    logits = stock(inputs_embeds=embeds, attention_mask=attention).logits[:, -length - 1 : -1]
    ends = first_plain(mask)
    token = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    if source == "soft_gaussian":
        gap = inputs["thinking_states"] - (logits / 0.5).softmax(-1) @ table
        std = 0.33 * table.detach().pow(2).mean().sqrt()
        likelihood = torch.where(mask, -gap.pow(2).sum(-1) / (2 * std**2), torch.where(ends, 0.0, token))
    else:
        kept = inputs["gumbels"] > -math.inf
        p = logits.softmax(-1).gather(-1, inputs["candidates"]) * kept
        p = (p / p.sum(-1, keepdim=True)).clamp(min=1e-30)
        z = torch.where(kept, inputs["gumbels"], 0.0) - torch.where(kept, p.log(), 0.0)
        each = ((-z - (-z).exp()) * kept).sum(-1)
        chosen = (p.log() * (inputs["candidates"] == inputs["completion_ids"][..., None])).sum(-1)
        likelihood = torch.where(mask, each, torch.where(ends, chosen, token))
    rows = (likelihood * live).sum(1) / live.sum(1)
    (-(inputs["advantages"] * rows).mean()).backward()
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight"):
        wanted = stock.model.get_parameter(name).grad
        found = trainer.model.model.get_parameter(name).grad
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
        assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_scoring_in_chunks_is_scoring_at_once(tmp_path, source):
    """1e-5: every chunk takes the soft tokens of its own rows."""
    trainer = soft(tmp_path, source)
    inputs = one_batch(trainer)
    ids, attention, length = whole(inputs)
    trainer._saved = SimpleNamespace(
        thinking_mask=inputs["thinking_mask"], **{name: inputs[name] for name in trainer.fields}
    )
    with torch.no_grad():
        once, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length)
        chunks, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, length, 3)
    torch.testing.assert_close(chunks, once, rtol=1e-5, atol=1e-5)
    assert (once - once.roll(1, 0)).abs().max() > 0.1


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_it_trains_saves_and_loads(tmp_path, source):
    """LoRA alone moves. What is loaded decodes the same: soft with noise, soft without, and hard."""
    trainer = soft(tmp_path, source, num_iterations=2, max_steps=4, gumbel_top_k=4, noise_scale=0.2)
    before = setups.parameters(trainer)
    trainer.train()
    assert all(math.isfinite(loss) for loss in setups.losses(trainer))
    logs = trainer.state.log_history
    assert logs[0]["thinking/log_ratio"] <= 1e-5 < 1e-4 < logs[1]["thinking/log_ratio"]
    after = setups.parameters(trainer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {group["role"] for group in trainer.optimizer.param_groups} == {"policy"}
    assert not any(name.startswith(("thinking/embeds", "thinking/projection")) for log in logs for name in log)
    trainer.save_model(str(tmp_path / "saved"))
    settings = json.loads((tmp_path / "saved" / "latent_reasoning.json").read_text())["settings"]
    assert settings["thinking_source"] == source and settings["gumbel_top_k"] == 4 and settings["noise_scale"] == 0.2
    assert any("lora_" in name for name in load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    cited = {"soft_gaussian": "2509.19170", "soft_gumbel": "2511.06411"}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert [number for number in ("2505.18454", *cited.values()) if f"eprint = {{arXiv:{number}}}" in card] == [
        cited[source]
    ]
    loaded, tokenizer = FastThinkingModel.from_pretrained(str(tmp_path / "saved"), load_in_4bit=False)
    matcher = DelimiterMatcher(tokenizer, "#", 64)
    ids = torch.tensor([[9, 12, 8, 30]])
    for how in ({"do_sample": True}, {"do_sample": False}, {"do_sample": False, "ablation": "off"}):
        found = []
        for model in (trainer.model.eval(), loaded.eval()):
            torch.manual_seed(0)
            found.append(hybrid_generate(model, ids, matcher, max_new_tokens=12, pad_token_id=0, **how))
        assert torch.equal(*found), how


@pytest.mark.parametrize("source", SOFT_SOURCES)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, source):
    """Step 3 lies inside a generation cycle, so the rollout comes from the checkpoint."""
    changes = {**SAVING, "num_iterations": 2}
    complete = soft(tmp_path, source, **changes)
    complete.train()
    torch.manual_seed(1234)
    resumed = soft(tmp_path, source, **changes)
    resumed.train(resume_from_checkpoint=checkpoint(tmp_path, 3))
    a, b = setups.parameters(complete), setups.parameters(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert setups.losses(complete)[3:] == setups.losses(resumed)[3:]
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "rollout_0.safetensors")
    for name in ("thinking_states", *SOFT_FIELDS[source]):
        assert any(name in key for key in saved), name


def test_two_ranks_agree(tmp_path):
    """As for thinking states: equal weights, ratio 1 at fresh steps, exact resume."""
    setups.base_folder(tmp_path)
    launch("tests.trl_ext.hrpo.two_process_worker", tmp_path, "frozen", "soft_gumbel", processes=2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal_on_both"] and result["resume_equal"]
    assert result["deviation"][0] <= 1e-5 and result["deviation"][2] <= 1e-5
    assert all(0 < share <= 1 for share in result["fraction"])


def test_the_log_ratio_is_of_scored_soft_tokens():
    new, rollout = torch.tensor([[1.0, 90.0], [-40.0, 0.5]]), torch.tensor([[1.5, -90.0], [2.0, 0.25]])
    mask = torch.tensor([[True, False], [False, True]])
    assert log_ratio(new, rollout, mask) == 0.5 and log_ratio(new, rollout, mask | True) == 180
    assert log_ratio(new, rollout, mask & False) == 0


def test_off_there_are_no_soft_tokens(tmp_path):
    """`thinking=False` is the parent, whatever the source (tests/drop_in compares it bit for bit)."""
    trainer = soft(tmp_path, "soft_gaussian", thinking=False, beta=0.1)
    assert not trainer.soft and not trainer.thinking
    trainer.train()
    assert not any("thinking/log_ratio" in log for log in trainer.state.log_history)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"recompute": "rollout"}, "recompute='rollout' with thinking_source='soft_gumbel': .*set recompute='frozen'"),
        ({"beta": 0.01}, "beta=0.01 with thinking_source='soft_gumbel': .*set beta=0"),
        ({"use_vllm": True}, "use_vllm=True with thinking_source='soft_gumbel': .*set use_vllm=False"),
        ({"gumbel_top_k": 1}, "gumbel_top_k=1: must be at least 2"),
        ({"noise_likelihood": "max"}, "noise_likelihood='max': choose one of sum, mean"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(tmp_path, changes, message):
    given = {"thinking_source": "soft_gumbel", "recompute": "frozen", **changes}
    with pytest.raises(ValueError, match=message):
        setups.arguments(HRPOConfig, tmp_path, **given)


@pytest.mark.parametrize("made, asked", [("projection", "soft_gumbel"), ("soft_gaussian", "projection")])
def test_a_model_made_for_something_else_is_refused(tmp_path, made, asked):
    model = attach_thinking(tiny.model(std=0.1), ThinkingConfig(thinking_source=made))
    recompute = "frozen" if asked == "soft_gumbel" else "rollout"
    with pytest.raises(ValueError, match=rf"thinking_source='{asked}': the model .* made with '{made}'"):
        setups.hrpo(tmp_path, model=model, thinking_source=asked, recompute=recompute)


def test_unsloths_trainer_refuses_them():
    from trl_ext.hrpo.unsloth import UnslothHRPOMixin

    trainer = SimpleNamespace(hrpo=SimpleNamespace(thinking_source="soft_gumbel"))
    with pytest.raises(ValueError, match=r"thinking_source='soft_gumbel': Unsloth's loss .* without importing unsloth"):
        UnslothHRPOMixin._check_soft(trainer)
