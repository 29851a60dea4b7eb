"""`FastThinkingModel`, which loads, wraps and merges HRPO models with Unsloth or with transformers and PEFT."""

import importlib.util
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from transformers import AutoConfig, PreTrainedModel

import patches

from ..common.attaching import read_settings
from ..common.backend import unsloth_can_run
from ..common.compat import enable_checkpointing
from ..common.hub import (
    adapter_keys,
    as_dtype,
    base_of,
    check_causal_lm,
    check_model,
    check_name,
    check_tokenizer,
    check_vocabulary,
    has_tokenizer,
    load_adapter,
    load_causal_lm,
    load_modules,
    load_tokenizer,
    nf4,
)
from ..common.settings_file import held_by, read_saved
from .adapter import THINKING_MODULES
from .method import METHOD
from .residual import ThinkingConfig, attach_thinking, drop_thinking, has_thinking


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastThinkingModel:
    """Loader with the arguments of Unsloth's `FastLanguageModel`. Our own arguments are keyword-only."""

    @staticmethod
    def from_pretrained(
        model_name: str = "Qwen/Qwen2.5-1.5B-Instruct",
        max_seq_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        load_in_4bit: bool | None = None,
        *,
        full_finetuning: bool = False,
        device_map: Any = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        thinking: ThinkingConfig | None = None,
        use_unsloth: bool | None = None,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel | PeftModel, Any]:
        """Load a base model, a full thinking model, or an adapter with its base, and attach thinking modules.

        Args:
            model_name: a hub id, or a folder with a model or an adapter.
            max_seq_length: tokens of prompt and completion together. None means 2048, or fewer if the model has fewer.
            dtype: such as `torch.bfloat16` or `"bfloat16"`. None means bf16 on a GPU that supports it, and fp32 on a
                CPU.
            load_in_4bit: None means 4-bit on a GPU with bitsandbytes, else not.
            full_finetuning: train all weights, which are then not loaded in 4-bit by default.
            device_map: as for transformers. None means the current device.
            token: the access token for the hub.
            trust_remote_code: as for transformers.
            thinking: how to think. None means what was saved with the model, or the defaults for a model that never
                thought.
            use_unsloth: None decides by `unsloth_ext.common.backend.unsloth_can_run`.
            **kwargs: for the `from_pretrained` that is called.

        Returns:
            The model and its tokenizer. The model is a `PeftModel` if `model_name` is an adapter. The tokenizer is the one
            saved with the adapter, with its chat template; without one, that of the base.

        Raises:
            ValueError: `fast_inference` is given; there is no such model; it is of another method; it has thinking
                modules without settings or settings without modules; files are damaged, lack tensors or hold NaN; or
                an adapter never thought and `thinking` was not given.
        """
        if kwargs.get("fast_inference"):
            raise ValueError(
                "fast_inference=True: Unsloth starts vLLM before the model has thinking modules, so its engine cannot "
                "think; leave it out. Without Unsloth, HRPOConfig(use_vllm=True) rolls out in vLLM"
            )
        dtype = as_dtype(dtype, kwargs)
        check_name(model_name, token)
        saved = read_saved(model_name, "hrpo", token)
        base_name = model_name if saved.adapter is None else base_of(saved.adapter, model_name)
        base = saved if saved.adapter is None else read_saved(base_name, "hrpo", token)
        # PEFT only restores modules that the model has when the adapter is loaded
        own = saved.adapter is not None and held_by(adapter_keys(model_name, token)) is not None
        if saved.adapter is not None and not own and not base.settings and saved.settings:
            raise ValueError(f"{model_name} has settings for modules, but lacks {', '.join(sorted(THINKING_MODULES))}")
        if saved.adapter is not None and not own and not base.settings and thinking is None:
            raise ValueError(
                f"the adapter {model_name} has no thinking modules ({', '.join(sorted(THINKING_MODULES))}); pass "
                "thinking=ThinkingConfig() to start from its LoRA weights with new ones"
            )
        use_unsloth = unsloth_can_run()[0] if use_unsloth is None else use_unsloth
        if load_in_4bit is None:
            load_in_4bit = (
                not full_finetuning and torch.cuda.is_available() and bool(importlib.util.find_spec("bitsandbytes"))
            )
        load = _load_unsloth if use_unsloth else _load_transformers
        model, tokenizer = load(
            base_name,
            max_seq_length=max_seq_length,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            full_finetuning=full_finetuning,
            device_map=device_map,
            token=token,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
        own_tokenizer = saved.adapter is not None and has_tokenizer(model_name, token)
        if own_tokenizer or tokenizer is None:
            named = model_name if own_tokenizer else base_name
            tokenizer = load_tokenizer(named, token, padding_side="left", trust_remote_code=trust_remote_code)
        if not base.settings:  # the files of a hub model are here only now
            read_saved(base_name, "hrpo", token)
        settings = saved.settings or base.settings
        thinking = thinking or (read_settings(settings, model_name, METHOD) if settings else None)
        before = saved.adapter is None or own or bool(base.settings)
        if before:
            attach_thinking(model, thinking)
            if base.settings:
                load_modules(model, base_name, THINKING_MODULES, token)
        if saved.adapter is not None:
            model = load_adapter(model, model_name, is_trainable=True, token=token)
            if use_unsloth:
                from unsloth import FastLanguageModel

                model = FastLanguageModel.patch_peft_model(model, kwargs.get("use_gradient_checkpointing", "unsloth"))
            if not before:
                attach_thinking(model, thinking)
        check_vocabulary(model, tokenizer, model_name)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: Any = LINEAR_LAYERS,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = False,
        random_state: int = 3407,
        modules_to_save: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Add LoRA to a thinking model. The thinking modules are trained in full and saved with the adapter.

        Args:
            model: a causal LM. It gets thinking modules if it has none.
            r: the rank, as in `LoraConfig`.
            target_modules: the layers with LoRA, as in `LoraConfig`.
            lora_alpha: as in `LoraConfig`.
            lora_dropout: as in `LoraConfig`.
            bias: as in `LoraConfig`.
            use_gradient_checkpointing: also turn gradient checkpointing on. `"unsloth"` is Unsloth's own kind.
            random_state: the seed of the new weights.
            modules_to_save: modules to train in full beside the thinking modules.
            **kwargs: further fields of `LoraConfig`.

        Returns:
            The `PeftModel`.

        Raises:
            ValueError: the model already has an adapter.
        """
        if isinstance(model, PeftModel):
            raise ValueError(
                "the model already has an adapter that can be trained: do not call get_peft_model, or "
                "merge it first (FastThinkingModel.merge)"
            )
        if not has_thinking(model):
            attach_thinking(model)
        modules_to_save = [*(modules_to_save or []), *THINKING_MODULES]
        if target_modules == "all-linear":
            kwargs["exclude_modules"] = [*kwargs.get("exclude_modules", []), *THINKING_MODULES]
        elif not isinstance(target_modules, str):
            target_modules = list(target_modules)
        settings = {
            "r": r,
            "target_modules": target_modules,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "bias": bias,
            "modules_to_save": modules_to_save,
            **kwargs,
        }
        if _is_unsloth(model):
            from unsloth import FastLanguageModel

            patches.apply("peft_module_check")
            model = FastLanguageModel.get_peft_model(
                model,
                use_gradient_checkpointing=use_gradient_checkpointing,
                random_state=random_state,
                **settings,
            )
        else:
            with torch.random.fork_rng():
                torch.manual_seed(random_state)
                model = peft_get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
            if use_gradient_checkpointing:
                enable_checkpointing(model, {"use_reentrant": False})
                model.enable_input_require_grads()
        return model

    @staticmethod
    def merge(model: PeftModel, *, keep_thinking: bool = True) -> PreTrainedModel:
        """Merge the adapter into the base model.

        Args:
            model: a model with an adapter.
            keep_thinking: keep the thinking modules, which `save_pretrained` then writes and `from_pretrained` loads.
                False gives a plain causal LM.

        Returns:
            The base model.
        """
        merged = model.merge_and_unload()
        return merged if keep_thinking else drop_thinking(merged)


def _is_unsloth(model: PreTrainedModel) -> bool:
    return hasattr(model, "max_seq_length") and hasattr(model, "for_training")


def _positions(name: str, **options) -> int | None:
    """Return the number of positions of a model, if its configuration states it."""
    return getattr(AutoConfig.from_pretrained(name, **options).get_text_config(), "max_position_embeddings", None)


def _load_transformers(
    name: str, *, max_seq_length, dtype, load_in_4bit, full_finetuning, device_map, token, trust_remote_code, **kwargs
):
    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if load_in_4bit:
        kwargs["quantization_config"] = nf4(dtype)
    if device_map is None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}
    common = {"token": token, "trust_remote_code": trust_remote_code}
    check_causal_lm(name, "hrpo", **common)
    most = _positions(name, **common)
    if max_seq_length is not None and most is not None and max_seq_length > most:
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than {name} supports (max_position_embeddings={most})"
        )
    return load_causal_lm(name, method="hrpo", dtype=dtype, device_map=device_map, **common, **kwargs), None


def _load_unsloth(name: str, **kwargs):
    from unsloth import FastLanguageModel

    if kwargs["device_map"] is None:  # Unsloth's default is not None
        del kwargs["device_map"]
    if kwargs["dtype"] == "auto":
        kwargs["dtype"] = None
    common = {"token": kwargs["token"], "trust_remote_code": kwargs["trust_remote_code"]}
    check_causal_lm(name, "hrpo", **common)  # Unsloth reports a missing model as an unsupported one
    check_tokenizer(name)
    if kwargs["max_seq_length"] is None:
        kwargs["max_seq_length"] = min(2048, _positions(name, **common) or 2048)
    # Before Unsloth binds its exports to the model
    patches.apply("save_pretrained")
    patches.apply("unsloth_export")
    patches.apply("unsloth_save_merged")
    # Unsloth's classes keep the stock forward for models it did not load, so that forward is patched too
    patches.apply("base_model_forward")
    patches.apply("llama_fast_forward")
    model, tokenizer = FastLanguageModel.from_pretrained(name, **kwargs)
    check_model(model, name)
    return model, tokenizer
