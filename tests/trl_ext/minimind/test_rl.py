"""Rewards: the number behind the delimiter, or a reward model's sigmoid."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from tests.recipes.running import run_recipe
from tests.trl_ext.minimind import setups
from trl_ext.minimind.rl import RewardModel, RLArguments, TokenBudget


def reward_model(folder, labels=1, template=True):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(setups.tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_labels=labels,
        pad_token_id=0,
        eos_token_id=2,
    )
    net = Qwen3ForSequenceClassification(config)
    with torch.no_grad():
        net.score.weight.normal_()
    net.save_pretrained(folder)
    tokenizer = setups.tokenizer()
    tokenizer.save_pretrained(folder)
    if not template:
        (folder / "chat_template.jinja").unlink()
    return str(folder)


def test_the_number_of_the_reference():
    reward = RLArguments().reward()
    said = [[{"role": "assistant", "content": text}] for text in ("7+5=12####12", "####11", "12")]
    assert reward(completions=said, answer=["12"] * 3) == [1.0, 0.0, 0.0]


def test_a_reward_model_gives_its_sigmoid_whatever_the_batch(tmp_path):
    """Padded batches against single rows, 1e-5."""
    reward = RewardModel(reward_model(tmp_path), batch_size=2)
    prompts = [setups.turns("Hello!"), setups.turns("What is 7+5-3?"), setups.turns("7")]
    said = [[{"role": "assistant", "content": text}] for text in ("Hello! Hello!", "9", "7+5=12")]
    found = reward(prompts=prompts, completions=said, answer=[""] * 3)
    for value, prompt, answer in zip(found, prompts, said, strict=True):
        ids = reward.tokenizer.apply_chat_template(prompt + answer, return_tensors="pt", return_dict=True)["input_ids"]
        assert value == pytest.approx(reward.model(input_ids=ids).logits[0, 0].sigmoid().item(), abs=1e-5)
    assert len({round(value, 4) for value in found}) == 3


def test_what_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="2 logits"):
        RewardModel(reward_model(tmp_path / "two", labels=2))
    with pytest.raises(ValueError, match="no chat template"):
        RewardModel(reward_model(tmp_path / "plain", template=False))
    with pytest.raises(
        ValueError, match=r"reward_model=.*/policy lacks score\.weight"
    ):  # which would be drawn at random
        RewardModel(setups.save(tmp_path / "policy"))


def test_a_budget_ends_training_when_it_is_used_up():
    """8 completions a rollout; a log between two rollouts has no length."""
    args, control = SimpleNamespace(generation_batch_size=8), SimpleNamespace(should_training_stop=False)
    budget = TokenBudget(60)
    for length, generated, over in ((2.5, 20, False), (None, 20, False), (4.0, 52, False), (1.0, 60, True)):
        logs = {"loss": 1.0} if length is None else {"completions/mean_length": length}
        budget.on_log(args, None, control, logs)
        assert (budget.generated, control.should_training_stop) == (generated, over)
    endless = TokenBudget(None)
    control.should_training_stop = False
    endless.on_log(args, None, control, {"completions/mean_length": 1e9})
    assert not control.should_training_stop
    with pytest.raises(ValueError, match="max_generated_tokens=0"):
        RLArguments(max_generated_tokens=0)


@pytest.mark.parametrize("stage", ["grpo", "ppo", "spo"])
def test_vllm_must_be_there_before_an_earlier_stage_is_run(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)
    with pytest.raises((ImportError, SystemExit)) as error:
        run_recipe(monkeypatch, f"minimind/{stage}.py", "--use_vllm", "true")
    assert "use_vllm=True: vLLM is not installed" in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())
