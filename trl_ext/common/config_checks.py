"""Checks of configuration fields that run before anything is loaded. Each error names the field and its value."""

import json
import math
from collections.abc import Collection
from numbers import Real
from typing import Any


# Lowest values of TRL's and transformers' fields. Smaller ones divide by zero later, or are ignored
LOWEST = {
    "num_generations": 1,
    "num_generations_eval": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "num_iterations": 1,
    "max_completion_length": 1,
    "max_length": 1,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "save_total_limit": 1,
    "num_train_epochs": 0,
    "max_steps": -1,
    "warmup_steps": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "warm_start_seed": 0,
    "embedded_seed": 0,
    "beta": 0,
    "epsilon": 0,
    "epsilon_high": 0,
    "top_k": 0,
    "adam_epsilon": 0,
}
POSITIVE = ("temperature", "repetition_penalty")
SHARES = {
    "adam_beta1": None,
    "adam_beta2": None,
    "top_p": 1,
    "min_p": 1,
}  # from 0 to below 1; with 1, up to and including 1
RL_CHOICES = {  # TRL 1.15 checks these only after the first rollout
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
}
MOST_SEED = 2**32 - 1  # numpy's limit


def at_least(arguments: Any, **lowest: int) -> None:
    """Raise a ValueError that names a field that is not a finite number or is below its lowest value. None is allowed."""
    for name, least in lowest.items():
        value = getattr(arguments, name)
        if value is not None and (not isinstance(value, Real) or value == math.inf):
            raise ValueError(f"{name}={value!r}: must be a finite number")
        if value is not None and not value >= least:  # type: ignore[operator]  # NaN too
            raise ValueError(f"{name}={value}: must be at least {least}")


def check_weights(**values: float) -> None:
    """Raise a ValueError that names a weight that is negative or not a finite number."""
    for name, value in values.items():
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: a weight is a number, 0 (off) or more")


def check_positive(**values: float | None) -> None:
    """Raise a ValueError that names a value that is not positive or not finite. None is allowed."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, Real) or not 0 < value < math.inf):
            raise ValueError(f"{name}={value!r}: must be more than 0")


def check_values(arguments: Any) -> None:
    """Check TRL's and transformers' fields: numbers in their range, and `..._kwargs` that hold JSON objects.

    Each of our configurations calls it before its parents' own checks, some of which divide by these numbers.

    Raises:
        ValueError: names the field and its value.
    """
    trains = hasattr(arguments, "learning_rate")  # without training, a temperature of 0 means greedy decoding
    names = [*LOWEST, *SHARES, *(POSITIVE if trains else ())]
    values = {name: getattr(arguments, name, None) for name in names}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    at_least(arguments, **{name: LOWEST[name] for name in numbers if name in LOWEST})
    for name, value in numbers.items():
        if value == math.inf:
            raise ValueError(f"{name}=inf: must be a finite number")
        if name in SHARES and not (0 <= value < 1 or value == SHARES[name]):
            raise ValueError(f"{name}={value}: from 0 to {'1' if SHARES[name] else 'less than 1'}")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{name}={value}: must be more than 0")
    for name in ("seed", "warm_start_seed", "embedded_seed"):
        if numbers.get(name, 0) > MOST_SEED:
            raise ValueError(f"{name}={numbers[name]}: at most {MOST_SEED}")
    if getattr(arguments, "output_dir", None) == "":  # would be the current folder
        raise ValueError("output_dir='': name a folder")
    if numbers.get("max_steps") == 0:  # transformers takes 0 for no limit
        raise ValueError("max_steps=0: must be at least 1, or -1 to let num_train_epochs decide")
    if numbers.get("num_train_epochs", 1) == 0 and numbers.get("max_steps", -1) < 0:
        raise ValueError("num_train_epochs=0: nothing would be trained; use more than 0, or set max_steps")
    if hasattr(arguments, "scale_rewards"):
        one_of(arguments, **RL_CHOICES)
        must_stay(arguments, "the policy loss has no labels to smooth; TRL ignores all but", label_smoothing_factor=0.0)
        must_stay(
            arguments,
            "rollouts are drawn by TRL's own sampler, which knows only shuffle_dataset; leave it at",
            train_sampling_strategy="random",
        )
    for value in getattr(arguments, "reward_weights", None) or ():
        if not math.isfinite(value):
            raise ValueError(f"reward_weights={arguments.reward_weights}: finite numbers")
    optim_args = getattr(arguments, "optim_args", None)
    if optim_args and not all(part.count("=") == 1 for part in optim_args.replace(" ", "").split(",")):
        raise ValueError(f"optim_args={optim_args!r}: name=value, separated by commas")
    objects = getattr(arguments, "_VALID_DICT_FIELDS", ())
    for name, value in vars(arguments).items():
        given = isinstance(value, str) and (name.endswith("_kwargs") or (name in objects and value.startswith("{")))
        if given and not _is_object(value):
            raise ValueError(f"{name}={value!r}: a JSON object, such as '{{\"name\": 1}}'")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def one_of(arguments: Any, **choices: Collection[Any]) -> None:
    """Raise a ValueError that names a field whose value is not among its choices."""
    for name, allowed in choices.items():
        value = getattr(arguments, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


def must_prepare(arguments: Any, why: str) -> None:
    """Raise a ValueError if `dataset_kwargs` asks to skip the preparation of the dataset. `why` says what the trainer
    does to it."""
    if (getattr(arguments, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        raise ValueError(f"dataset_kwargs: skip_prepare_dataset {why}; leave it out")


def must_ignore_lengths(arguments: Any) -> None:
    """Raise a ValueError for a sampler that sorts rows by length: transformers reads lengths from `input_ids` alone."""
    strategy = getattr(arguments, "train_sampling_strategy", "random")
    if strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={strategy!r}: rows have several texts here, so no single length; set it to 'random' "
            "or 'sequential'"
        )


def must_stay(arguments: Any, why: str, **only: Any) -> None:
    """Raise a ValueError that names a field that differs from the only value that works. `why` precedes that value in
    the message.

    Fields that the configuration does not have are skipped.
    """
    for name, value in only.items():
        if getattr(arguments, name, value) != value:
            raise ValueError(f"{name}={getattr(arguments, name)!r}: {why} {value!r}")


def must_be_off(arguments: Any, **why: str) -> None:
    """Raise a ValueError that names a switch that is on and says why it must be off. Missing fields count as off."""
    for name, reason in why.items():
        if getattr(arguments, name, False):
            raise ValueError(f"{name}=True: {reason}; set {name}=False")
