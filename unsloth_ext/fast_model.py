"""`FastThinkingModel`: load, wrap, save, merge. Unsloth where it can run, transformers + PEFT otherwise."""

import importlib.util
from typing import Any

import torch
from peft import PeftModel
from peft import get_peft_model as peft_get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import patches

from .adapter import THINKING_MODULES, ThinkingLoraConfig, remember_thinking
from .backend import unsloth_can_run
from .hub import base_of, load_adapter, load_full, load_modules, read_json
from .residual import ThinkingConfig, attach_thinking, backbone_of, drop_thinking, has_thinking


LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FastThinkingModel:
    """Loader with the arguments of Unsloth's `FastLanguageModel`; ours are keyword-only."""

    @staticmethod
    def from_pretrained(
        model_name: str = "Qwen/Qwen2.5-1.5B-Instruct",
        max_seq_length: int = 2048,
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
        """Load a base model, a full thinking model, or an adapter folder with its base, thinking modules attached.

        Args:
            model_name: hub id, or a folder with a model or an adapter.
            dtype: such as `torch.bfloat16` or `"bfloat16"`; None takes bf16 on a GPU that has it, fp32 on a CPU.
            load_in_4bit: None means 4-bit on a GPU with bitsandbytes, else not.
            thinking: how to think. None takes what was saved with the model, or the defaults on a model that never
                thought.
            use_unsloth: None decides by `unsloth_ext.backend.unsloth_can_run`.

        Returns:
            (model, tokenizer); the model is a `PeftModel` when `model_name` is an adapter.

        Raises:
            ValueError: the adapter has no thinking modules and `thinking` was not given, or names a tensor wrongly.
        """
        adapter = read_json(model_name, "adapter_config.json", token)
        saved = (adapter or {}).get("thinking")
        if adapter is not None:
            missing = set(THINKING_MODULES) - set(adapter.get("modules_to_save") or ())
            if missing and thinking is None:
                raise ValueError(
                    f"the adapter {model_name} has no thinking modules ({', '.join(sorted(missing))}); pass "
                    "thinking=ThinkingConfig() to start from its LoRA weights with new ones"
                )
        base_name = model_name if adapter is None else base_of(adapter, model_name)
        use_unsloth = unsloth_can_run()[0] if use_unsloth is None else use_unsloth
        if load_in_4bit is None:
            load_in_4bit = (
                not full_finetuning and torch.cuda.is_available() and bool(importlib.util.find_spec("bitsandbytes"))
            )
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
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
        saved = saved or getattr(model.config, "thinking", None)
        thinking = thinking or (ThinkingConfig(**saved) if saved else None)
        if adapter is None or not missing:  # PEFT restores only what the base has
            attach_thinking(model, thinking)
        if adapter is not None:
            model = load_adapter(model, model_name, is_trainable=True, token=token)
            if use_unsloth:
                from unsloth import FastLanguageModel

                model = FastLanguageModel.patch_peft_model(model, kwargs.get("use_gradient_checkpointing", "unsloth"))
            if missing:
                attach_thinking(model, thinking)
            remember_thinking(model, backbone_of(model).thinking_config)
        elif saved:
            load_modules(model, model_name, THINKING_MODULES, token)
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
        """LoRA on a thinking model; the thinking modules train in full beside it and are saved with the adapter."""
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
                model = peft_get_peft_model(model, ThinkingLoraConfig(task_type="CAUSAL_LM", **settings))
            if use_gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
        remember_thinking(model, backbone_of(model).thinking_config)
        return model

    @staticmethod
    def merge(model: PeftModel, *, keep_thinking: bool = True) -> PreTrainedModel:
        """The base model with the adapter merged in; its thinking modules stay (`save_pretrained` then writes them and
        `from_pretrained` finds them) or are dropped."""
        merged = model.merge_and_unload()
        return merged if keep_thinking else drop_thinking(merged)


def _is_unsloth(model: PreTrainedModel) -> bool:
    return hasattr(model, "max_seq_length") and hasattr(model, "for_training")


def _load_transformers(
    name: str, *, max_seq_length, dtype, load_in_4bit, full_finetuning, device_map, token, trust_remote_code, **kwargs
):
    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    if load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    common = {"token": token, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **common)
    if max_seq_length > getattr(config, "max_position_embeddings", max_seq_length):
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than {name} was made for "
            f"(max_position_embeddings={config.max_position_embeddings})"
        )
    if device_map is None and torch.cuda.is_available():
        device_map = {"": torch.cuda.current_device()}
    load = load_full if hasattr(config, "thinking") else AutoModelForCausalLM.from_pretrained
    model = load(name, dtype=dtype, device_map=device_map, **common, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", **common)
    return model, tokenizer


def _load_unsloth(name: str, **kwargs):
    from unsloth import FastLanguageModel

    if kwargs["device_map"] is None:  # its own default is not None
        del kwargs["device_map"]
    # Unsloth's classes keep the stock forward for models it did not load: that one must know our keywords as well
    patches.apply("base_model_forward")
    patches.apply("llama_fast_forward")
    return FastLanguageModel.from_pretrained(name, **kwargs)
