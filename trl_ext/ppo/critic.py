"""The critic: a stock token classifier with one label, whose logit at a token is the value of what comes after it."""

import copy
import inspect
from typing import Any

import torch
from accelerate.utils import broadcast
from peft import PeftModel
from torch import nn
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoModelForTokenClassification, PreTrainedModel

from unsloth_ext.common.hub import check_finite, check_name
from unsloth_ext.common.master_weights import MasterLinear


def critic_of(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A critic with a copy of the policy's backbone, adapters merged, and a head of zeros.

    Raises:
        ValueError: no stock class for the architecture, or quantized weights.
    """
    adapted = isinstance(policy, PeftModel)
    base = policy.get_base_model() if adapted else policy
    if type(base.config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"critic_model: transformers has no token classifier for {base.config.model_type!r}, the policy's "
            "architecture; give one of another that reads the same tokens"
        )
    if getattr(base, "is_quantized", False):
        raise ValueError("critic_model: the policy is quantized, so no critic can be made from its weights; give one")
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


def load_critic(name: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A critic from a folder or the hub, its backbone in `dtype`; a head that is not among its weights begins at zero."""
    check_name(name)
    with torch.random.fork_rng():
        # All of it in float32, or the head's last digits would be lost
        critic, found = AutoModelForTokenClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    backbone = f"{critic.base_model_prefix}."
    lost = [name for name in found["missing_keys"] if name.startswith(backbone)]
    if lost:
        raise ValueError(f"critic_model={name!r}: it has no {lost[0]}, so it is no saved critic or language model")
    check_finite(dict(critic.named_parameters()), f"critic_model={name!r}")
    _zero(critic, found["missing_keys"])
    for parameter in critic.base_model.parameters():  # not buffers, which transformers leaves in float32
        parameter.data = parameter.data.to(dtype)
    critic.config.dtype = dtype
    return critic


def _zero(model: nn.Module, names: Any) -> None:
    for name in names:
        nn.init.zeros_(model.get_parameter(name))


def ready(critic: PreTrainedModel, tokens: int, device: torch.device) -> None:
    """Checks that it is a critic for a vocabulary of so many tokens, and makes it ready to be trained, alike everywhere.

    Its head is float32 from now on. Without dropout: a value must not change between rollout and loss unless it learned.
    """
    if not isinstance(critic, PreTrainedModel) or critic.config.num_labels != 1:
        labels = getattr(getattr(critic, "config", None), "num_labels", "no")
        raise ValueError(
            f"critic_model is a {type(critic).__name__} with {labels} labels; load it with "
            "AutoModelForTokenClassification.from_pretrained(..., num_labels=1)"
        )
    rows = critic.get_input_embeddings().weight.shape[0]
    if rows < tokens:
        raise ValueError(f"critic_model has {rows} embeddings and the policy's tokenizer {tokens} tokens")
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
    with torch.no_grad():
        for parameter in critic.parameters():  # as the policy's, which DDP takes from the first process
            parameter.copy_(broadcast(parameter.data))


def values_before(critic: PreTrainedModel, ids: torch.Tensor, attention: torch.Tensor, length: int) -> torch.Tensor:
    """Value before each of the last `length` tokens of ids (B, T), which the critic says at the token before it.

    (B, length), float32. What comes after a token, padding too, has no part in its value.
    """
    inputs = {"input_ids": ids, "attention_mask": attention}
    if "position_ids" in inspect.signature(type(critic).forward).parameters:
        inputs["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)  # learned ones would count the padding
    return critic(**inputs).logits[:, -length - 1 : -1, 0].float()
