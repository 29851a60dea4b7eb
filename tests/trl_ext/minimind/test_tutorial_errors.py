"""What the tutorial writes and what TRL's stock trainers and our data do instead; docs/minimind.md has the whole list."""

import json

import pytest
import torch
from datasets import config as datasets_config
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from patches import fused_lm_head
from tests import tiny
from tests.trl_ext.hrpo.setups import arguments, base_folder, prompts
from tests.trl_ext.minimind import setups
from trl_ext.distill.config import TAGS, ReasoningDistillConfig
from trl_ext.minimind import data
from trl_ext.tasks.files import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def log_probs(model, prompt, completion):
    """(T) of one completion: float64, unpadded."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def moved(model, std=0.05):
    """Away from the reference, or from the policy that sampled."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * std)


# -- DPO ------------------------------------------------------------------------------------------------------------

PAIRS = [("What is 7+5?", "7+5=12;12-3=9####9", "9"), ("Hello!", "Hello!", "What is 7+5-3? Hello!")]


def dpo(tmp_path, **changes):
    """A trainer on pairs of unequal lengths, and its one batch; the policy is not the reference."""
    file = tmp_path / "dpo.jsonl"
    sides = [{"chosen": setups.turns(asked, a), "rejected": setups.turns(asked, b)} for asked, a, b in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in sides))
    rows = data.as_texts(data.load_minimind_data(file, "dpo"), setups.tokenizer())
    fused_lm_head.ensure()
    args = DPOConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, beta=0.1, **changes)
    trainer = DPOTrainer(
        setups.save(tmp_path / "model"), args=args, train_dataset=rows, processing_class=setups.tokenizer()
    )
    moved(trainer.model)
    return trainer, next(iter(trainer.get_train_dataloader()))


def margins(trainer, batch):
    """(pi_w - ref_w) - (pi_l - ref_l) of each pair, of the log-probs' sums and of their means."""
    with torch.no_grad():
        ratios = []
        for ids, mask, own in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"]):
            ids, own = ids[mask.bool()].tolist(), own[mask.bool()].bool()
            split = ids[: int((~own).sum())], ids[int((~own).sum()) :]
            ratios.append(log_probs(trainer.model, *split) - log_probs(trainer.ref_model, *split))
    chosen, rejected = ratios[: len(PAIRS)], ratios[len(PAIRS) :]
    pairs = list(zip(chosen, rejected))
    assert all(max(map(len, pair)) > 2 * min(map(len, pair)) for pair in pairs)
    return [torch.stack([reduce(good) - reduce(bad) for good, bad in pairs]) for reduce in (torch.sum, torch.mean)]


@pytest.mark.parametrize("changes, right, wrong", [({}, 0, 1), ({"loss_type": "sigmoid_norm"}, 1, 0)], ids=str)
def test_dpo_sums_log_probs_and_only_sigmoid_norm_divides_by_length(tmp_path, changes, right, wrong):
    """-log sigmoid(beta margin), mean of the pairs, to 1e-5 (fp32). By default of sums; the tutorial's is of means."""
    trainer, batch = dpo(tmp_path, **changes)
    assert trainer.loss_types == [changes.get("loss_type", "sigmoid")]
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch).item()
    losses = [-logsigmoid(0.1 * margin).mean().item() for margin in margins(trainer, batch)]
    assert found == pytest.approx(losses[right], abs=1e-5)
    assert abs(found - losses[wrong]) > 0.01


# -- GRPO -----------------------------------------------------------------------------------------------------------


def grpo(tmp_path, reward, **changes):
    """A stock trainer after its first rollout: 3 prompts of 4 completions."""
    args = arguments(GRPOConfig, tmp_path / "out", **{"per_device_train_batch_size": 12, "max_steps": 1, **changes})
    fused_lm_head.ensure()
    return GRPOTrainer(
        base_folder(tmp_path), reward, args, train_dataset=prompts(12), processing_class=tiny.tokenizer()
    )


def test_grpo_whitens_once(tmp_path):
    """(r - mean) / (std + 1e-4) of each group, to 1e-5. The tutorial whitens these once more over the batch: a group whose
    rewards are all the same then makes the advantages of the others larger."""
    given, made = [], []

    def reward(completions, **_):
        found = [text.count("1") / 4 + 0.01 * len(text) + 0.1 * i for i, text in enumerate(completions)]
        given.append(found[:8] + [0.5] * 4)
        return given[-1]

    trainer = grpo(tmp_path, reward)
    parent = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: made.append(parent(inputs)) or made[-1]
    trainer.train()
    rewards, found = torch.tensor(given[0]).view(3, 4), made[0]["advantages"].view(3, 4)
    single = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    double = (single - single.mean()) / (single.std() + 1e-8)
    assert (found - single).abs().max() <= 1e-5
    assert not found[2].any() and found[:2].abs().max() > 1
    assert (double - found).abs().max() > 0.2


# -- CISPO ----------------------------------------------------------------------------------------------------------


def batch_far_from_the_sampler(tmp_path, epsilon_high):
    """A CISPO trainer and a batch whose ratios are spread around 1, as in a second pass over a rollout."""
    trainer = grpo(
        tmp_path,
        lambda completions, **_: [text.count("1") / 4 + 0.01 * len(text) for text in completions],
        loss_type="cispo",
        epsilon_high=epsilon_high,
        num_iterations=2,
        beta=0.0,
    )
    captured, parent = [], trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: captured.append(inputs) or parent(model, inputs)
    trainer.train()
    trainer._compute_loss = parent
    trainer.current_gradient_accumulation_steps = 1
    moved(trainer.model)
    return trainer, captured[0]


def slopes(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()])


def test_cispo_is_the_clipped_ratio_held_fixed_times_the_log_prob(tmp_path):
    """The mean over all tokens of -min(ratio, epsilon_high) A log pi, the first factor held fixed: loss to 1e-5, gradient
    to 1e-4 of its largest entry. `epsilon_high` is TRL's, the bound itself (MiniMind has 5.0) and not what is
    added to 1; here 1.1, which the ratios reach."""
    trainer, batch = batch_far_from_the_sampler(tmp_path, 1.1)
    ours = trainer._compute_loss(trainer.model, batch)
    found = slopes(trainer, ours)

    def plain(bound):
        terms, capped = [], 0
        for i in range(len(batch["advantages"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            now = log_probs(trainer.model, prompt, completion)
            ratio = (now - batch["old_per_token_logps"][i][: len(completion)].double()).exp().detach()
            terms.append(-ratio.clamp(max=bound) * batch["advantages"][i].double() * now)
            capped += int((ratio > bound).sum())
        assert capped > 3
        return torch.cat(terms).mean()

    wanted = plain(1.1)
    assert ours.item() == pytest.approx(wanted.item(), abs=1e-5)
    expected = slopes(trainer, wanted)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    other = slopes(trainer, plain(1.0))
    assert (found - other).abs().max() > 1e-3 * other.abs().max()


def test_cispo_learns_from_tokens_that_ppos_clip_silences(tmp_path):
    """Of the tokens that PPO's clip at 1 - 0.2 and 1 + 0.2 holds, alone: PPO's gradient is 0, CISPO's is not."""
    trainer, batch = batch_far_from_the_sampler(tmp_path, 5.0)
    with torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        now = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
    ratio, gain = (now - batch["old_per_token_logps"]).exp(), batch["advantages"][:, None]
    held = ((ratio > 1.21) & (gain > 0)) | ((ratio < 0.79) & (gain < 0))
    batch["tool_mask"] = (held & batch["completion_mask"].bool()).long()
    assert batch["tool_mask"].sum() > 3
    cispo = slopes(trainer, trainer._compute_loss(trainer.model, batch))
    trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high = "dapo", 0.2, 0.2
    ppo = slopes(trainer, trainer._compute_loss(trainer.model, batch))
    assert not ppo.any() and cispo.abs().max() > 1e-3


# -- tags -----------------------------------------------------------------------------------------------------------


def test_the_tag_is_think_and_not_thought(tmp_path):
    """The trainer's default tags are those that the data must have; a row with `<thought>` is refused, its tag named."""
    assert TAGS == data.TAGS == ("<think>", "</think>", "<answer>", "</answer>")
    args = ReasoningDistillConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False)
    assert tuple(args.tags) == TAGS
    file = tmp_path / "reason.jsonl"

    def load(tag):
        said = f"<{tag}>\nA sum.\n</{tag}>\n<answer>\n12\n</answer>"
        file.write_text(json.dumps({"conversations": setups.turns("7+5?", said)}) + "\n")
        return said, data.load_minimind_data(file, "reason")

    with pytest.raises(DataError, match=r"line 1, conversations\[1\].content: has <think> 0 times"):
        load("thought")
    said, rows = load("think")
    assert rows[0]["messages"][1]["content"] == said
