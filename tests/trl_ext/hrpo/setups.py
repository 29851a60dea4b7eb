"""A tiny HRPO run: model, tokenizer, data, reward, trainer. Shared by the trainer tests."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from tests import tiny


def reward_digits(completions, **_):
    """Share of the character 1: cheap, and never the same for a whole group of random completions."""
    return [text.count("1") / 4 + 0.01 * len(text) for text in completions]


def prompts(rows: int = 24) -> Dataset:
    """Prompts of different lengths, so that batches are left-padded."""
    return Dataset.from_list(
        [{"prompt": "+".join(str(i % 7) for i in range(2 + row % 4)) + "="} for row in range(rows)]
    )


def base_folder(tmp_path: Path, family: str = "qwen3", std: float = 0.1) -> str:
    folder = tmp_path / f"base-{family}"
    if not folder.exists():
        tiny.model(family, std=std).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def arguments(config_class, output_dir: Path, **changes):
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return config_class(**settings)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def hrpo(
    tmp_path: Path,
    *,
    peft: bool | LoraConfig = True,
    model=None,
    dataset=None,
    reward=reward_digits,
    tokenizer=None,
    **changes,
):
    """An HRPOTrainer; its delimiter '#' occurs in random completions."""
    from trl_ext import HRPOConfig, HRPOTrainer

    args = arguments(HRPOConfig, tmp_path / "out", **{"answer_delimiter": "#", **changes})
    return HRPOTrainer(
        model or base_folder(tmp_path),
        reward,
        args,
        train_dataset=dataset or prompts(),
        processing_class=tokenizer or tiny.tokenizer(),
        peft_config=lora() if peft is True else peft or None,
    )


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
