"""UnslothGRPOTrainer with thinking states: its loss against a plain one, its old log-probs, what it saves."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import os
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file, save_file

import patches
from patches.grpo_accumulated_loss import NAME, thinking_batch, thinking_forwards
from patches.unsloth_export import allowed
from tests import tiny
from tests.unsloth_scripts.fast_forward import difference, load, saved
from unsloth_ext import FastThinkingModel, attach_thinking, backbone_of
from unsloth_ext.common.settings_file import read_saved
from unsloth_ext.hrpo.residual import THINKING_MODULES


BETA = 0.1


def keywords(mask, hidden) -> dict:
    return {"thinking_mask": mask, "recompute_thinking_projection": True, "thinking_hidden_states_cache": hidden}


def trainer_of(mini_batch: int | None = None):
    folder = saved(pad_is_rare(tiny.model("qwen3")))
    torch.manual_seed(0)
    model = FastThinkingModel.get_peft_model(load(folder), r=4)
    tiny.loud_gates(backbone_of(model))
    args = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=2,
        max_completion_length=12,
        max_steps=4,
        beta=BETA,
        learning_rate=1e-3,
        optim="adamw_torch",
        loss_type="grpo",
        fp16=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        temperature=1.0,
        unsloth_grpo_mini_batch=mini_batch,
    )
    rows = Dataset.from_dict({"prompt": ["1+2=", "12-3+4=", "7*8=", "9=", "1+1=", "2+2="]})
    reward = lambda completions, **_: [float(len(set(c))) for c in completions]  # noqa: E731
    return trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=args, train_dataset=rows, processing_class=tiny.tokenizer()
    )


def pad_is_rare(model):
    """Unsloth takes a sampled pad token for padding."""
    model.get_input_embeddings().weight.data[0] = 0
    return model


def batch() -> dict:
    torch.manual_seed(3)
    prompts, completions = torch.randint(3, 40, (4, 7)), torch.randint(3, 40, (4, 9))
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompt_mask[0, :3] = prompt_mask[2, :5] = 0
    completion_mask[1, 6:] = completion_mask[3, 2:] = 0
    return {
        "prompt_ids": prompts.masked_fill(prompt_mask == 0, 0),
        "prompt_mask": prompt_mask,
        "completion_ids": completions.masked_fill(completion_mask == 0, 0),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8]),
        "num_items_in_batch": completion_mask.sum(),
    }


def log_probs(model, inputs, **thinking):
    """(B, C) by one plain left-padded forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention, **thinking).logits
    start = inputs["prompt_ids"].shape[1]
    return logits[:, start - 1 : -1].log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)


def plain_loss(model, inputs, reference, thinking):
    new, mask = log_probs(model, inputs, **thinking), inputs["completion_mask"]
    ratio = (new - new.detach()).exp()
    kl = ((reference - new).exp() - (reference - new) - 1) * ratio  # TRL's use_bias_correction_kl
    per_token = -ratio * inputs["advantages"][:, None] + BETA * kl.clamp(max=10)  # Unsloth's clamp
    return ((per_token * mask).sum(-1) / mask.sum(-1)).mean()


def thinking_gradients(model) -> dict:
    """Of the thinking modules and of LoRA's effect on them there is one name in either kind of model."""
    out = {}
    for name, parameter in backbone_of(model).named_parameters():
        if name.split(".")[0] in THINKING_MODULES and parameter.grad is not None:
            out[name.replace("modules_to_save.default.", "")] = parameter.grad.clone()
    return out


def loss_checks(report: dict, mini_batch: int | None, packing: str) -> None:
    os.environ["UNSLOTH_GRPO_SEQ_PACKING"] = packing
    trainer, inputs = trainer_of(mini_batch=mini_batch), batch()
    model = trainer.model.train()
    torch.manual_seed(5)
    mask, hidden = inputs["completion_mask"].bool() & (torch.rand(4, 9) < 0.8), torch.randn(4, 9, 32)
    thinking = keywords(mask, hidden)
    stock = attach_thinking(pad_is_rare(tiny.model("qwen3")))  # LoRA's B is zero: the adapter changes nothing yet
    weights = {k: v for k, v in backbone_of(model).state_dict().items() if "modules_to_save" in k}
    weights = {k.replace("modules_to_save.default.", ""): v for k, v in weights.items()}
    assert not backbone_of(stock).load_state_dict(weights, strict=False).unexpected_keys
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    def scored(**how):
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(model, ids, attention, 9, **how)[0]

    inputs["ref_per_token_logps"] = scored().clone()
    with torch.no_grad():
        reference = log_probs(stock, inputs)
    patches.revert(NAME)
    live = trl.GRPOTrainer.compute_loss.__globals__
    original = live[NAME]
    before = _loss_and_gradients(trainer, inputs)
    patches.apply(NAME)
    after = _loss_and_gradients(trainer, inputs)
    key = f"packing={packing} mini_batch={mini_batch}"
    found = report[key] = {"untouched": before[0].equal(after[0])}
    found["untouched"] &= all(before[1][k].equal(after[1][k]) for k in before[1]) and bool(before[1])

    with thinking_batch(**thinking):
        loss, _ = _loss_and_gradients(trainer, inputs)
    unwrapped = trainer.accelerator.unwrap_model(model)
    found["packed"] = getattr(unwrapped, "_unsloth_seq_packing_grad_ok", None)
    ours = thinking_gradients(model)
    expected = plain_loss(stock, inputs, reference, thinking) / trainer.current_gradient_accumulation_steps
    expected.backward()
    theirs = thinking_gradients(stock)
    assert ours.keys() == theirs.keys() and len(theirs) == 6
    found["loss"], found["loss_difference"] = loss.item(), abs(loss.item() - expected.item())
    found["gradient_difference"] = max(difference(ours[k], theirs[k]) / theirs[k].abs().max().item() for k in ours)
    found["thinking_matters"] = abs(loss.item() - before[0].item())

    with thinking_forwards(model, ids, 0, **thinking):
        old = scored()
    with torch.no_grad():
        new = log_probs(stock, inputs, **thinking)
    found["old_log_probs"] = unpacked_difference(old, new, inputs)
    patches.revert(NAME)
    found["restored"] = live[NAME] is original
    patches.apply(NAME)
    report.update(errors(trainer, inputs, thinking, ids))


def _loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def errors(trainer, inputs, thinking, ids) -> dict:
    """What must not pass in silence."""
    said = {}

    def expect(name, action):
        try:
            action()
        except (ValueError, patches.PatchError) as error:
            said[name] = str(error)

    def other_rows():
        with thinking_forwards(trainer.model, ids, 0, **thinking):
            trainer.model(input_ids=ids + 1)

    def nothing():
        with thinking_forwards(trainer.model, ids, 0, **thinking):
            pass

    def unpatched():
        with patches.applied(NAME):
            patches.revert(NAME)
            with thinking_batch(**thinking):
                trainer.compute_loss(trainer.model, dict(inputs))

    expect("other_rows", other_rows)
    expect("nothing", nothing)
    expect("unpatched", unpatched)
    patches.apply(NAME)
    return {"errors": said}


def unpacked_difference(packed, expected, inputs) -> float:
    """Between Unsloth's layout (left-packed, the last C + most left pads columns) and (B, C), where the mask is."""
    mask, left_pads = inputs["completion_mask"].bool(), (inputs["prompt_mask"] == 0).sum(1)
    columns = torch.arange(mask.shape[1])[None] + (left_pads.max() - left_pads)[:, None]
    return difference(packed.gather(1, columns)[mask], expected[mask])


def merged_files(model, folder) -> dict:
    """What `save_pretrained_merged` left, and whether its modules are the model's."""
    kept = load_file(f"{folder}/unsloth/latent_reasoning.safetensors")
    ours = {
        k.replace("base_model.model.", "").replace("modules_to_save.default.", ""): v
        for k, v in model.state_dict().items()
    }
    with open(f"{folder}/unsloth/config.json") as config, open(f"{folder}/unsloth/latent_reasoning.json") as settings:
        said = json.load(config)["thinking"], json.load(settings)["settings"]
    return {
        "modules": sorted({name.split(".")[1] for name in kept}),
        "equal": all(torch.equal(kept[name], ours[name]) for name in kept),
        "settings": said[0] == said[1] == vars(backbone_of(model).thinking_config),
        "card": "FastThinkingModel.from_pretrained" in Path(f"{folder}/unsloth/README.md").read_text(),
        "lost": lost(f"{folder}/lost"),
    }


def lost(folder) -> str:
    try:
        read_saved(folder, "hrpo")
    except ValueError as error:
        return str(error)
    return "opened"


def save(model) -> tuple[str, dict[str, str]]:
    """A folder with what the model says, saved as `adapter` and, whole, as `merged` by us, as `unsloth` by Unsloth, and as
    `lost` by Unsloth without our patches; and what refused exports say."""
    folder = tempfile.mkdtemp()
    ids, mask, hidden = torch.arange(3, 23)[None], torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 5, 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        logits = model.eval()(input_ids=ids, **keywords(mask, hidden)).logits
    model.save_pretrained(f"{folder}/adapter")
    exports = {
        "gguf": lambda: model.save_pretrained_gguf(f"{folder}/no", tiny.tokenizer()),
        "push gguf": lambda: model.push_to_hub_gguf("us/model", tiny.tokenizer()),
        "push merged": lambda: model.push_to_hub_merged("us/model", tiny.tokenizer()),
        "merged and push": lambda: model.save_pretrained_merged(f"{folder}/no", tiny.tokenizer(), push_to_hub=True),
        "4-bit": lambda: model.save_pretrained_merged(f"{folder}/no", tiny.tokenizer(), "merged_4bit_forced"),
        "fp8": lambda: model.save_pretrained_merged(f"{folder}/no", tiny.tokenizer(), "fp8"),
        "torchao": lambda: model.save_pretrained_torchao(f"{folder}/no", tiny.tokenizer()),
        "ggml": lambda: model.save_pretrained_ggml(f"{folder}/no", tiny.tokenizer()),
        "openvino": lambda: model.save_pretrained_openvino(f"{folder}/no", tiny.tokenizer()),
    }
    said = {}
    for name, export in exports.items():
        try:
            export()
        except ValueError as error:
            said[name] = str(error)
    assert not os.path.exists(f"{folder}/no")
    with allowed():
        model.save_pretrained_merged.__func__.__wrapped__(model, f"{folder}/lost", tiny.tokenizer())
    model.save_pretrained_merged(f"{folder}/unsloth", tiny.tokenizer())
    model.save_pretrained_merged(f"{folder}/lora", tiny.tokenizer(), save_method="lora")
    said["files"] = merged_files(model, folder)
    FastThinkingModel.merge(model).save_pretrained(f"{folder}/merged")
    tiny.tokenizer().save_pretrained(f"{folder}/merged")
    save_file({"ids": ids, "mask": mask, "hidden": hidden, "logits": logits}, f"{folder}/said.safetensors")
    return folder, said


if __name__ == "__main__":
    report = {}
    patches.apply(NAME)
    loss_checks(report, None, "1")
    loss_checks(report, 2, "0")
    report["saved"], report["refused"] = save(trainer_of().model)
    print(json.dumps(report))
