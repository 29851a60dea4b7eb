"""PPO's critic: a stock token classifier with one label. Its logit at a token is the value of what follows."""

import copy
import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoModelForTokenClassification, PreTrainedModel

import patches
from unsloth_ext.common.hub import check_finite, check_name
from unsloth_ext.common.master_weights import MasterLinear

from ..common.modules_beside import from_first_process


@patches.applied("zero3_loading")
def critic_of(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Make a critic from the policy: a copy of its backbone, with adapters merged, and a head of zeros.

    Raises:
        ValueError: transformers has no token classifier for the architecture, or the weights are quantized.
    """
    adapted = isinstance(policy, PeftModel)
    base = policy.get_base_model() if adapted else policy
    if type(base.config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"critic_model: transformers has no token classifier for {base.config.model_type!r}, the policy's "
            "architecture; pass a critic of another architecture with the same tokenizer"
        )
    if getattr(base, "is_quantized", False):
        raise ValueError("critic_model: the policy is quantized, so no critic can be made from its weights; pass one")
    if adapted and not policy.active_peft_config.is_prompt_learning:
        base = copy.deepcopy(policy).merge_and_unload()
    config = copy.deepcopy(base.config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    with torch.random.fork_rng():
        critic = AutoModelForTokenClassification.from_config(config, dtype=base.dtype)
    critic.base_model.load_state_dict(base.base_model.state_dict())
    _zero(
        critic, [name for name, _ in critic.named_parameters() if not name.startswith(f"{critic.base_model_prefix}.")]
    )
    return critic


@patches.applied("zero3_loading")
def load_critic(name: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Load a critic from a folder or the hub. A head that is not among its weights starts at zero.

    Args:
        name: hub id or folder.
        dtype: of the backbone; the head stays in float32.
        trust_remote_code: for `from_pretrained`.

    Raises:
        ValueError: the weights lack a part of the backbone, or hold NaN.
    """
    check_name(name)
    with torch.random.fork_rng():
        # Load everything in float32, otherwise the head would lose digits
        critic, found = AutoModelForTokenClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    backbone = f"{critic.base_model_prefix}."
    lost = [name for name in found["missing_keys"] if name.startswith(backbone)]
    if lost:
        raise ValueError(
            f"critic_model={name!r}: it has no {lost[0]}, so it is neither a saved critic nor a language model"
        )
    check_finite(dict(critic.named_parameters()), f"critic_model={name!r}")
    _zero(critic, found["missing_keys"])
    for parameter in critic.base_model.parameters():  # not the buffers: transformers keeps them in float32
        parameter.data = parameter.data.to(dtype)
    critic.config.dtype = dtype
    return critic


def _zero(model: nn.Module, names: Any) -> None:
    for name in names:
        nn.init.zeros_(model.get_parameter(name))


def ready(critic: PreTrainedModel, tokens: int, device: torch.device) -> None:
    """Check a critic and prepare it for training, with the same weights on every process.

    Its head becomes float32. Dropout is disabled: a value must change between rollout and loss only by training.

    Args:
        critic: the critic.
        tokens: size of the policy's vocabulary.
        device: where to put it.

    Raises:
        ValueError: it does not have one label, or has fewer embeddings than the policy has tokens.
    """
    if not isinstance(critic, PreTrainedModel) or critic.config.num_labels != 1:
        labels = getattr(getattr(critic, "config", None), "num_labels", "no")
        raise ValueError(
            f"critic_model is a {type(critic).__name__} with {labels} labels; load it with "
            "AutoModelForTokenClassification.from_pretrained(..., num_labels=1)"
        )
    rows = critic.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise ValueError(f"critic_model has {rows} embeddings, but the policy's tokenizer has {tokens} tokens")
    for name, module in list(critic.named_modules()):
        if type(module) is nn.Linear and not name.startswith(f"{critic.base_model_prefix}."):
            critic.set_submodule(name, MasterLinear.of(module))
    critic.to(device).train().requires_grad_(True)
    critic.config.use_cache = False
    for module in critic.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    from_first_process(critic.parameters())


def values_before(critic: PreTrainedModel, ids: torch.Tensor, attention: torch.Tensor, length: int) -> torch.Tensor:
    """The value before each of the last `length` tokens, which is the critic's output at the token before.

    A value does not depend on later tokens or padding.

    Args:
        critic: the critic.
        ids (B, T): long.
        attention (B, T): long, 0 or 1.
        length: number of tokens.

    Returns:
        (B, length), float32.
    """
    inputs = {"input_ids": ids, "attention_mask": attention}
    if "position_ids" in inspect.signature(type(critic).forward).parameters:
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)  # learned positions would count the padding
    return critic(**inputs).logits[:, -length - 1 : -1, 0].float()
