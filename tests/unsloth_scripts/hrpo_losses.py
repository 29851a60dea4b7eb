"""One HRPO run by one script: on stock TRL when called as `hrpo_losses`, on Unsloth when hrpo.py imports it."""

import json
import tempfile

import torch

from tests import tiny
from tests.trl_ext.hrpo import setups


RUNS = [("projection", "rollout"), ("projection", "two_pass"), ("soft_embedding", "frozen")]
NAMES = ("loss", "kl", "grad_norm/policy", "thinking/projection_grad_norm", "thinking/embeds_ratio", "reward")


def losses(source: str, recompute: str) -> dict:
    """Four steps with every default of HRPOConfig where `setups.arguments` names no other value: what is logged, and
    the completions."""
    from trl_ext import HRPOConfig, HRPOTrainer
    from unsloth_ext import FastThinkingModel, ThinkingConfig

    folder, net = tempfile.mkdtemp(), tiny.model("qwen3", std=0.3)
    net.get_input_embeddings().weight.data[0] = 0  # Unsloth takes a sampled pad token for padding: make it rare
    net.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    model, _ = FastThinkingModel.from_pretrained(
        folder, max_seq_length=128, dtype=torch.float32, load_in_4bit=False,
        device_map="cpu", thinking=ThinkingConfig(thinking_source=source),
    )  # fmt: skip
    model = FastThinkingModel.get_peft_model(model, r=4)
    torch.manual_seed(0)
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    completions = []

    def reward(completions: list, seen=completions, **_) -> list[float]:
        seen.append(completions)
        return setups.reward_digits(completions)

    args = setups.arguments(
        HRPOConfig, tempfile.mkdtemp(), answer_delimiter="#", thinking_source=source, recompute=recompute,
        temperature=0.7, num_iterations=2, beta=0.05, max_steps=4, gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = HRPOTrainer(
        model, reward, args, train_dataset=setups.prompts(), processing_class=tiny.tokenizer()
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"completions": completions} | {name: [entry.get(name) for entry in logged] for name in NAMES}


def report() -> dict:
    return {f"{source} {recompute}": losses(source, recompute) for source, recompute in RUNS}


if __name__ == "__main__":
    import trl

    print(json.dumps(report() | {"parent": trl.GRPOTrainer.__module__}))
