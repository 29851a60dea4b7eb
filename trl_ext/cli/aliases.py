"""Other programs' names for our fields.

A name with the same meaning is accepted. For others, the error says what to use here. docs/migrating.md shows the
table.
"""

from collections.abc import Collection
from typing import Any

from trl_ext.common.spelling import did_you_mean


# Their name: our name, and if values differ, our value for each of theirs
RENAMED: dict[str, str | tuple[str, dict[str, str]]] = {
    # the public HRPO scripts and the note
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "lr_residual_Lambda": "lr_residual_lambda",
    "warmup_ratio": "warmup_steps",
    "optimizer": "optim",
    "group_size": "num_generations",
    "checkpoint_path": "checkpoint",
    "model_name_or_path": "model_name",
    "teacher": "teacher_model_name_or_path",
    "student": "model_name",
    # CODI's code and the note on latent tokens
    "num_latent": "num_latents",
    "num_latent_tokens": "num_latents",
    "num_iterations": "iterations",
    "prj_dim": "projection_dim",
    "prj_dropout": "projection_dropout",
    "prj_no_ln": ("projection_layer_norm", {"true": "false", "false": "true"}),
    "distill_loss_div_std": ("codi_std_mode", {"true": "divide_loss", "false": "none"}),
    "distill_loss_type": ("codi_loss", {"smooth_l1": "smooth_l1", "l1": "l1", "l2": "mse"}),
    "distill_loss_factor": "w_codi",
    "ref_loss_factor": "w_teacher",
    "alpha1_codi": "w_codi",
    "alpha2_kv": "w_kv",
    "teacher_ce_weight": "w_teacher",
    "use_projection": "kv_projection",
    "use_layernorm": "kv_layer_norm",
    "lambda_mix": "kv_mix_lambda",
    "model_max_length": "max_length",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
}
ANSWERED = {
    "max_prompt_length": "TRL no longer truncates prompts",
    "batch_size": "a step has per_device_train_batch_size x gradient_accumulation_steps rows per process",
    "use_prj": "set projection_dim=N for a projection of that width, or null (the default) for none",
    "layerwise_std": "set codi_std_mode and kv_std_mode to divide_loss, normalize_states (layerwise_std: true) or none",
    "kv_budget": "training compresses the trace to num_latents keys; for decoding, use CompressedCache(model, budget=...)",
    "B_buffer": "training has none; for decoding, use CompressedCache(model, buffer=...)",
    "greedy": "decoding is greedy without do_sample",
}
# The fields that limit lengths instead of `max_prompt_length`, if a recipe has them
BOUNDS = {
    "max_seq_length": "prompt and completion together",
    "max_completion_length": "the completion",
    "max_length": "the whole row",
}
# Blocks of a configuration file: their keys and the corresponding fields
BLOCKS: dict[str, dict[str, str]] = {
    "lora": {"r": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "lora_target_modules"},
    "loss": {
        "alpha1_codi": "w_codi",
        "alpha2_kv": "w_kv",
        "teacher_ce_weight": "w_teacher",
        "use_projection": "kv_projection",
        "use_layernorm": "kv_layer_norm",
    },
    "loss_config": {name: name for name in ("alpha_k", "alpha_v", "alpha_attn", "alpha_norm")},
}


def renamed(name: str, value: Any, known: Collection[str]) -> tuple[str, Any] | None:
    """Our name and value for another program's flag; None if the name is ours or unknown.

    Args:
        name: name of the flag.
        value: its value.
        known: our names.

    Raises:
        ValueError: there is no such setting or value here. The message says what to use.
    """
    if name in known:
        return None
    found = RENAMED.get(name)
    target, values = found if isinstance(found, tuple) else (found, None)
    if target is not None and target in known:
        if values is None:
            return target, value
        theirs = str(value).lower()
        if theirs not in values:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(values)}; our name is {target}")
        return target, values[theirs]
    if name in ANSWERED:
        answer = ANSWERED[name]
        if name == "max_prompt_length":
            answer += "".join(f"; {bound} bounds {what}" for bound, what in BOUNDS.items() if bound in known)
        raise ValueError(f"{name}: this setting does not exist here: {answer}")
    return None


def flattened(fields: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of a configuration file without blocks, under our names.

    Args:
        fields: the content of the file.
        known: our names.

    Raises:
        ValueError: a block has an unknown key, a field is given twice, or the recipe has no such field.
    """
    flat: dict[str, tuple[str, Any]] = {}

    def add(place: str, name: str, value: Any) -> None:
        try:
            ours, value = renamed(name, value, known) or (name, value)
        except ValueError as error:
            raise ValueError(f"{place.removesuffix(name)}{error}") from None
        if ours in flat:
            raise ValueError(f"{place} and {flat[ours][0]} both set {ours}; give only one of them")
        flat[ours] = (place, value)

    for name, value in fields.items():
        keys = BLOCKS.get(name) if isinstance(value, dict) and name not in known else None
        if keys is None:
            add(name, name, value)
            continue
        for key, inner in value.items():
            field = keys.get(key, key if key in keys.values() else None)
            if field is None:
                raise ValueError(
                    f"{name}.{key}: there is no such key; {name} has {', '.join(keys)}{did_you_mean(str(key), keys)}"
                )
            if field not in known and field not in ANSWERED:
                raise ValueError(f"{name}.{key}: this recipe has no {field}{did_you_mean(field, known)}")
            add(f"{name}.{key}", field, inner)
    return {name: value for name, (_, value) in flat.items()}
