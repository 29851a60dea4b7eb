"""TRL's own trainers, which tell our failures from upstream's."""

import torch
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from patches import fused_lm_head
from tests import tiny
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo


def sft(folder, peft=False, **changes):
    fused_lm_head.ensure()  # the loss of TRL does not run here without it
    torch.manual_seed(0)
    return SFTTrainer(
        distill.student(),
        SFTConfig(**distill.settings(folder, **changes)),
        **distill._common(distill.ROWS, tiny.tokenizer(()), peft),
    )


def grpo(folder, peft=False, **changes):
    fused_lm_head.ensure()
    return GRPOTrainer(
        hrpo.base_folder(folder),
        hrpo.reward_digits,
        hrpo.arguments(GRPOConfig, folder / "out", **changes),
        train_dataset=hrpo.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**distill.LORA) if peft else None,
    )


CASES = {
    f"stock {name}{', LoRA' * peft}": lambda folder, make=make, peft=peft, **changes: make(folder, peft=peft, **changes)
    for name, make in (("sft", sft), ("grpo", grpo))
    for peft in (False, True)
}
