"""A tiny SPO run: model, tokenizer, data, reward, trainer."""

from pathlib import Path

from peft import LoraConfig

from tests import tiny
from tests.trl_ext.hrpo.setups import arguments, base_folder, parameters, prompts  # noqa: F401 - for the tests here


def reward_digits(completions, **_):
    """From 0 to 1, and seldom the same for two random completions."""
    return [min(1.0, text.count("1") / 4 + 0.01 * len(text)) for text in completions]


def rollouts(prompts, trainer):
    """Completions that depend on the prompt and the step alone."""
    tokenizer, step = trainer.processing_class, trainer.state.global_step
    completions = []
    for prompt in prompts:
        ids = [
            (7 * len(prompt) + 5 * i + 3 * step + prompt.count("3")) % 40 + 3
            for i in range(3 + (len(prompt) + step) % 5)
        ]
        completions.append([*ids, tokenizer.eos_token_id])
    return {
        "prompt_ids": tokenizer(text=prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def spo(
    folder: Path, *, model=None, peft: bool = False, reward=reward_digits, dataset=None, rollout_func=None, **changes
):
    from trl_ext import SPOConfig, SPOTrainer

    args = arguments(SPOConfig, folder / "out", **{"num_generations": 1, "per_device_train_batch_size": 4, **changes})
    return SPOTrainer(
        model or base_folder(folder),
        reward,
        args,
        train_dataset=dataset if dataset is not None else prompts(12),
        processing_class=tiny.tokenizer(),
        rollout_func=rollout_func,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
