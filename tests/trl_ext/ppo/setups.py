"""A tiny PPO run: model, tokenizer, data, reward, trainer."""

from pathlib import Path

from peft import LoraConfig

from tests import tiny
from tests.trl_ext.hrpo.setups import arguments, base_folder, losses, prompts, reward_digits  # noqa: F401


def rollouts(prompts, trainer, env_mask: bool = False):
    """Completions that depend on the prompt and the step alone, so that one process and two sample alike."""
    tokenizer, step = trainer.processing_class, trainer.state.global_step
    completions = []
    for prompt in prompts:
        length = 3 + (len(prompt) + prompt.count("3") + step) % 5
        ids = [(7 * len(prompt) + 5 * i + 3 * step + prompt.count("3")) % 40 + 3 for i in range(length)]
        completions.append([*ids, tokenizer.eos_token_id])
    found = {
        "prompt_ids": tokenizer(text=prompts)["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }
    if env_mask:  # the second and third token are the environment's
        found["env_mask"] = [[int(i not in (1, 2)) for i in range(len(ids))] for ids in completions]
    return found


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def ppo(folder: Path, *, model=None, reward=reward_digits, rows: int = 24, **changes):
    """Keywords of PPOTrainer, and fields of PPOConfig."""
    from trl_ext import PPOConfig, PPOTrainer

    given = {name: changes.pop(name, None) for name in ("critic_model", "peft_config", "rollout_func")}
    changes = {"num_generations": 1, "per_device_train_batch_size": 4, "target_kl": None, **changes}
    return PPOTrainer(
        model or base_folder(folder),
        reward,
        arguments(PPOConfig, folder / "out", **changes),
        train_dataset=prompts(rows),
        processing_class=tiny.tokenizer(),
        **given,
    )


def trained(trainer):
    """Policy and critic by name."""
    return {name: p.detach().clone() for name, p in trainer._named_trained().items()}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
