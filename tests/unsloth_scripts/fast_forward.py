"""Stock and Unsloth decoders with the same weights and thinking states: outputs and gradients; then undo."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import sys
import tempfile

import torch
from unsloth import FastLanguageModel
from unsloth.models import llama

import patches
from tests import tiny
from unsloth_ext import FastThinkingModel, attach_thinking, backbone_of
from unsloth_ext.hrpo.residual import THINKING_MODULES


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")


def saved(model) -> str:
    """A folder with `model` and a tokenizer."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def load(folder: str):
    return FastThinkingModel.from_pretrained(
        folder, max_seq_length=128, dtype=torch.float32, load_in_4bit=False, device_map="cpu"
    )[0]


def twin(model, family):
    """A stock model with the weights of an Unsloth one."""
    stock = attach_thinking(tiny.model(family))
    tiny.loud_gates(backbone_of(model))
    stock.load_state_dict(model.state_dict())
    return stock


def difference(a, b) -> float:
    return (a - b).abs().max().item()


def batch():
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (3, 20))
    attention = torch.ones_like(ids)
    attention[0, :4] = 0
    mask = torch.rand(3, 12) < 0.7
    return ids, attention, mask, torch.randn(3, 12, 32)


def gradients(model, logits) -> dict:
    model.zero_grad()
    logits.square().mean().backward()
    backbone = backbone_of(model)
    return {n: p.grad for n in THINKING_MODULES for p in getattr(backbone, n).parameters()}


def compare(family: str, model, stock) -> dict:
    ids, attention, mask, hidden = batch()
    states = {"thinking_mask": mask, "thinking_embeds": hidden}
    recompute = {
        "thinking_mask": mask,
        "recompute_thinking_projection": True,
        "thinking_hidden_states_cache": hidden,
    }
    out = {}
    model.eval()
    left_padded = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
    }
    real = attention.bool()
    out["left_padded"] = difference(
        model(**left_padded, **states).logits[real], stock(**left_padded, **states).logits[real]
    )
    note = {"input_ids": ids, "inputs_embeds": hidden, "thinking_mask": mask}
    out["notes_call"] = difference(model(**note).logits, stock(input_ids=ids, **states).logits)
    note |= {"recompute_thinking_projection": True, "thinking_hidden_states_cache": hidden.flip(0)}
    wanted = stock(input_ids=ids, **(recompute | {"thinking_hidden_states_cache": hidden.flip(0)}))
    out["notes_recompute"] = difference(model(**note).logits, wanted.logits)
    model.train()
    a, b = model(input_ids=ids, **recompute).logits, stock(input_ids=ids, **recompute).logits
    out["left_packed"] = difference(a, b)
    ours, theirs = gradients(model, a), gradients(stock, b)
    out["gradients"] = max(difference(ours[n], theirs[n]) / theirs[n].abs().max().item() for n in ours)
    flat = ids.reshape(1, -1)
    lengths = torch.tensor([20, 20, 20], dtype=torch.int32)
    whole = torch.cat([torch.zeros(3, 8, dtype=torch.bool), mask], 1).reshape(1, -1)
    at = torch.cat([torch.zeros(3, 8, 32), hidden], 1).reshape(1, -1, 32)
    packed = model(
        input_ids=flat,
        position_ids=torch.arange(20).repeat(3)[None],
        packed_seq_lengths=lengths,
        use_cache=False,
        thinking_mask=whole,
        thinking_embeds=at,
    ).logits
    out["packed"] = difference(packed.reshape(3, 20, -1), stock(input_ids=ids, **states).logits)
    out["not_thinking"] = difference(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    out["thinking_matters"] = difference(stock(input_ids=ids, **states).logits, stock(input_ids=ids).logits)
    return out


def checkpointing() -> float:
    """Largest difference of any gradient with Unsloth's gradient checkpointing and without, under LoRA."""
    found, folder = [], saved(tiny.model("qwen3"))
    ids, _, mask, hidden = batch()
    for mode in (False, "unsloth"):
        torch.manual_seed(0)
        model = FastThinkingModel.get_peft_model(load(folder), r=4, use_gradient_checkpointing=mode)
        model.train()
        logits = model(input_ids=ids, thinking_mask=mask, thinking_embeds=hidden).logits
        model.zero_grad()
        logits.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() and any("thinking_residual_gate_i" in n for n in plain)
    return max(difference(plain[n], checkpointed[n]) for n in plain)


def count_calls() -> list:
    """Grows by one in every decoder forward of Unsloth's."""
    calls, norm = [], llama.fast_rms_layernorm
    llama.fast_rms_layernorm = lambda *args, **kwargs: calls.append(1) or norm(*args, **kwargs)
    return calls


def undo() -> dict:
    """Apply, apply again, revert: what is bound afterwards."""
    patches.revert("llama_fast_forward")
    name = "LlamaModel_fast_forward"
    modules = [m for n, m in sys.modules.items() if n.startswith("unsloth.models.") and name in vars(m)]
    before = [getattr(m, name) for m in modules]
    patches.apply("llama_fast_forward")
    after = [getattr(m, name) for m in modules]
    count = len(patches.get("llama_fast_forward").changes)
    patches.apply("llama_fast_forward")
    again = len(patches.get("llama_fast_forward").changes)
    status = patches.status()["llama_fast_forward"]
    patches.revert("llama_fast_forward")
    return {
        "modules": len(modules),
        "one_original": len({id(f) for f in before}),
        "all_replaced": all(a is not b for a, b in zip(before, after, strict=True)),
        "idempotent": count == again,
        "live": status.live,
        "fingerprint": len(status.fingerprint),
        "restored": all(getattr(m, name) is b for m, b in zip(modules, before, strict=True)),
    }


def loaded_first() -> float:
    """A model that Unsloth loaded before the patch was applied thinks as well."""
    assert not patches.get("llama_fast_forward").changes
    folder = saved(tiny.model("qwen2"))
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=128, dtype=torch.float32, load_in_4bit=False, device_map="cpu"
    )
    site, sites = (type(model.model), "forward"), patches.get("llama_fast_forward").sites
    assert site in sites() and sites(site[0], llama) == [site, (llama, "LlamaModel_fast_forward")]
    patches.apply("llama_fast_forward")
    attach_thinking(model)
    stock = twin(model, "qwen2")
    ids, _, mask, hidden = batch()
    states = {"thinking_mask": mask, "thinking_embeds": hidden}
    return difference(model.eval()(input_ids=ids, **states).logits, stock(input_ids=ids, **states).logits)
