"""A check that training would change the model."""

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from unsloth_ext.common.evaluation_mode import never_pack, packed_layer


def check_trainable(model: nn.Module) -> None:
    """Raise a ValueError if training would not change the model.

    That is the case if it has no trainable parameter, if its active adapter is frozen, merged or disabled, or if its
    layers let no gradient pass. Modules trained beside the model, such as an aligner or a critic, do not count.
    """
    frozen = _frozen_adapter(model)
    if frozen is not None:
        raise ValueError(
            f"the model's adapter {frozen!r} is frozen, so training would not change it: load it with "
            "PeftModel.from_pretrained(base_model, folder, is_trainable=True), or merge it and name the folder of "
            "the whole model"
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the model's adapter is merged into the base weights, so training would not change it: call "
            "model.unmerge_adapter(), or pass model.merge_and_unload() to train all of it"
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "the model's adapter is disabled, so training would not change it: call model.enable_adapter_layers()"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "every parameter of the model is frozen (requires_grad=False), so training would not change it: call "
            "model.requires_grad_(True), or pass a peft_config"
        )
    if packed := packed_layer(model):
        raise ValueError(
            f"{packed}: its 4-bit weights were packed when the model was used in evaluation mode on this CPU, and "
            "bitsandbytes passes no gradient through them: load the model again and train it before you evaluate it"
        )
    never_pack(model)


def _frozen_adapter(model: nn.Module) -> str | None:
    """The first active adapter that is loaded for inference and has no trainable parameter; None if there is none.

    PEFT keeps its adapters in `peft_config`. So does transformers if `from_pretrained` was given an adapter's folder.
    """
    configs = getattr(model, "peft_config", None) or {}
    active = model.active_adapters if isinstance(model, PeftModel) else list(configs)
    for name in active:
        own = [p for path, p in model.named_parameters() if name in path.split(".")]  # empty for a merged adapter
        if configs[name].inference_mode and own and not any(parameter.requires_grad for parameter in own):
            return name
    return None
