"""The cases of concept tokens for gpu_check.py.

Losses are finite; LoRA, head and embedding are trained; decoding and FlexAttention agree with a forward pass over whole
texts in SDPA.
"""

import time
from itertools import pairwise

import setups
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config

from trl_ext import ConceptConfig, ConceptTrainer
from unsloth_ext import backbone_of
from unsloth_ext.concept import flex_attention


CASES = {"literal": {}, "stable": {**ConceptConfig.preset_fields("stable"), "num_codebooks": 2}}
# Deviation of hidden states relative to their root mean square: decoding, and FlexAttention, against one pass
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1, "4bit": 0.1}
STEPS = 3
WRITTEN = 24


def train(folder: str, case: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning."""
    base = AutoModelForCausalLM.from_pretrained(folder).config
    torch.manual_seed(1)
    layers = {"num_hidden_layers": 4, "layer_types": None, "max_position_embeddings": 4096}
    made = AutoModelForCausalLM.from_config(Qwen2Config(**{**base.to_dict(), **layers}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    deeper = f"{folder}/concept_base"
    made.save_pretrained(deeper)
    model = AutoModelForCausalLM.from_pretrained(deeper, **setups.loading(precision))
    args = ConceptConfig(
        learning_rate=1e-3,
        n_shallow=1,
        n_deep=1,
        num_concepts=64,
        target_ratio=3.0,
        gradient_checkpointing=False,
        **setups.few_steps(precision, STEPS),
        **CASES[case],
    )
    trainer = ConceptTrainer(
        model,
        args,
        train_dataset=setups.reasoned(),
        processing_class=setups.tokenizer(base.vocab_size - 64),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer._named_trained = lambda: dict(trainer.model.named_parameters())
    started = time.perf_counter()
    learned = setups.watched(trainer, ["lora_", "concept_head", "concept_embedding"])
    seconds = round((time.perf_counter() - started) / STEPS, 3)
    with trainer.compute_loss_context_manager():
        deviation = max(written(trainer), skipped(trainer))
    return {
        **learned,
        "seconds_per_step": seconds,
        "deviation": deviation,
        "bound": BOUNDS[precision],
        "trainer": trl.SFTTrainer.__name__,
    }


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of `wanted`."""
    return ((found - wanted).float().square().mean() / wanted.float().square().mean()).sqrt().item()


def some(trainer: ConceptTrainer, tokens: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The decoder, a batch of two texts, and concepts for a third of their tokens."""
    backbone = backbone_of(trainer.model.eval())
    config, generator = backbone.concept_config, torch.Generator().manual_seed(0)
    ids = torch.randint(300, 1000, (2, tokens), generator=generator)
    concepts = torch.randint(config.num_concepts, (2, tokens, config.num_codebooks), generator=generator)
    concepts[torch.rand(2, tokens, generator=generator) > 1 / 3] = config.null
    return backbone, ids.to(trainer.args.device), concepts.to(trainer.args.device)


@torch.no_grad()
def written(trainer: ConceptTrainer) -> float:
    """Deviation of reading half a text, some more tokens, and then single tokens, from reading it at once."""
    backbone, ids, concepts = some(trainer, 2 * WRITTEN)
    whole = backbone(ids, concepts=concepts, use_cache=False).last_hidden_state
    cuts = [0, WRITTEN, *range(WRITTEN + 5, 2 * WRITTEN + 1)]
    cache, pieces = None, []
    for a, b in pairwise(cuts):
        out = backbone(ids[:, a:b], concepts=concepts[:, a:b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.last_hidden_state)
    return off(torch.cat(pieces, dim=1), whole)


def skipped(trainer: ConceptTrainer) -> float:
    """Deviation of FlexAttention, which long texts use on a GPU, from SDPA, in states and in the embedding's gradient."""
    if not setups.CUDA:
        return 0.0
    backbone, ids, concepts = some(trainer, flex_attention.FLEX_FROM)
    found, kept = [], flex_attention.FLEX_FROM
    weights = torch.randn(
        *ids.shape, backbone.config.hidden_size, device=ids.device
    )  # random weights, because normalised states have equal squares
    for start in (kept, 10 * kept):
        flex_attention.FLEX_FROM = start
        states = backbone(ids, concepts=concepts, use_cache=False).last_hidden_state
        weight = next(p for n, p in trainer.model.named_parameters() if "concept_embedding" in n and p.requires_grad)
        found.append((states.detach(), torch.autograd.grad((states.float() * weights).sum(), weight)[0]))
    flex_attention.FLEX_FROM = kept
    return max(off(a, b) for a, b in zip(*found, strict=True))
