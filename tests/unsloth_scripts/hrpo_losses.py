"""One HRPO run by one script: on stock TRL when called as `hrpo_losses`, on Unsloth when hrpo.py imports it."""

import json
import tempfile

import torch

from tests import tiny
from tests.trl_ext.hrpo import setups


RUNS = [("projection", "rollout"), ("projection", "two_pass"), ("soft_embedding", "frozen")]
MODES = [
    ("projection", "rollout"),
    ("projection", "two_pass"),
    ("projection", "jacobi"),
    ("soft_embedding", "frozen"),
    ("soft_embedding", "soft_bptt"),
    ("soft_embedding", "jacobi"),
]
NAMES = ("loss", "kl", "grad_norm/policy", "thinking/projection_grad_norm", "thinking/embeds_ratio", "reward")


def losses(source: str, recompute: str) -> dict:
    """Four steps with every default of HRPOConfig where `setups.arguments` names no other value: what is logged, and
    the completions."""
    from trl_ext import HRPOConfig, HRPOTrainer
    from unsloth_ext import FastThinkingModel, ThinkingConfig, backbone_of

    folder, net = tempfile.mkdtemp(), tiny.model("qwen3", std=0.2)
    net.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    model, _ = FastThinkingModel.from_pretrained(
        folder,
        max_seq_length=128,
        dtype=torch.float32,
        load_in_4bit=False,
        device_map="cpu",
        thinking=ThinkingConfig(thinking_source=source),
    )
    model = FastThinkingModel.get_peft_model(model, r=4)
    # LoRA stays fresh: the KL reference of an adapter that says something is itself on TRL, the base model on Unsloth
    tiny.loud_gates(backbone_of(model))
    torch.nn.init.constant_(
        backbone_of(model).thinking_residual_Lambda.Lambda, 4.0
    )  # Unsloth bounds a token's KL at 10
    torch.manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    completions = []

    def reward(completions: list, seen=completions, **_) -> list[float]:
        seen.append(completions)
        return setups.reward_digits(completions)

    args = setups.arguments(
        HRPOConfig,
        tempfile.mkdtemp(),
        answer_delimiter="#",
        thinking_source=source,
        recompute=recompute,
        temperature=0.7,
        generation_kwargs={"suppress_tokens": [0]},  # Unsloth takes a sampled pad token for padding
        num_iterations=2,
        beta=0.05,
        max_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    trainer = HRPOTrainer(model, reward, args, train_dataset=setups.prompts(), processing_class=tiny.tokenizer())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"completions": completions} | {name: [entry.get(name) for entry in logged] for name in NAMES}


def report() -> dict:
    return {f"{source} {recompute}": losses(source, recompute) for source, recompute in RUNS}


if __name__ == "__main__":
    import trl

    print(json.dumps(report() | {"parent": trl.GRPOTrainer.__module__}))
