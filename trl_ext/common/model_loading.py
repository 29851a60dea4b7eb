"""Model loading hooks and checks for trainers, TRL's own and the ones that Unsloth puts in their place."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import trl
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

import patches
from patches.fsdp_loading import VARIABLE
from patches.trainer_model_loading import watching_models
from patches.trainer_reward_models import loading_reward_models
from unsloth_ext.common.attaching import check_adapter, read_settings, settings_of
from unsloth_ext.common.hub import (
    check_causal_lm,
    check_model,
    check_tokenizer,
    load_classifier,
    load_modules,
    load_tokenizer,
)
from unsloth_ext.common.master_weights import MasterWeights, copied_by_peft, master_weights, widen
from unsloth_ext.common.method import Method
from unsloth_ext.common.positions import learned_positions
from unsloth_ext.common.settings_file import method_of, read_saved


logger = logging.get_logger(__name__)

TOKENIZED = ("input_ids", "plan_ids", "text_ids")  # columns of tokenized rows
TAKEN_FROM_THE_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations of LoRA that change the base weights


@contextlib.contextmanager
def preparing_models(
    init: Callable, prepare: Callable[[PreTrainedModel], Any] = lambda _: None, policy: Any = None
) -> Iterator[None]:
    """Check every model that a trainer loads by name while the context is open, and load tokenizers of reward models.

    Args:
        init: the `__init__` of the trainer.
        prepare: called with each language model, but not with reward models.
        policy: the model to train, or its name. Other models are loaded in every process.

    Raises:
        ValueError: the files lack tensors (TRL 1.15 would initialise them at random), hold NaN, or lack the tokenizer.
    """

    def check_and_prepare(model: PreTrainedModel, name: str, missing: list[str]) -> None:
        check_model(model, name, missing)
        prepare(model)

    loads = iter([contextlib.nullcontext()] if isinstance(policy, str) else [])  # of the policy

    def reward_model(*args: Any, **kwargs: Any) -> Any:
        with _in_every_process():
            return load_classifier(*args, **kwargs)

    with (
        patches.applied("zero3_loading"),
        watching_models(init, check_and_prepare, lambda: next(loads, None) or _in_every_process()),
        loading_reward_models(init, reward_model, load_tokenizer),
    ):
        yield


def _in_every_process() -> contextlib.AbstractContextManager:
    return patches.applied("fsdp_loading") if VARIABLE in os.environ else contextlib.nullcontext()


def attach_method(
    model: PreTrainedModel,
    method: Method,
    attach: Callable[[Any], Any],
    asked: Any,
    token: str | None,
    seed: int,
    unasked: tuple[str, ...] = (),
) -> bool:
    """Attach the modules of a method: the ones that the model was saved with, or new ones. Attached modules stay as
    they are.

    Args:
        model: the model to train, wrapped by PEFT or not.
        method: the method's record.
        attach: attaches the modules; called with the settings of the model's folder, or with `asked`.
        asked: the settings that the trainer's configuration asks for.
        token: for the hub.
        seed: seed of new modules. The global random state does not change.
        unasked: settings that the configuration leaves open.

    Returns:
        Whether the modules are new.

    Raises:
        ValueError: the model's adapter would not train the modules or was made before them, or the model's folder lacks
            one of their tensors.
    """
    if settings_of(model, method) is None:
        attach_saved(model, method, attach, token)
    if settings_of(model, method) is None:
        if is_peft_model(model):
            raise ValueError(
                f"the model is wrapped by PEFT and has no {method.what}: pass the unwrapped model with peft_config"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attach(asked)
        return True
    if is_peft_model(model):
        check_adapter(model, method)
    warn_of_kept_settings(model, settings_of(model, method), asked, unasked)
    return False


def warn_of_kept_settings(model: PreTrainedModel | str, kept: Any, asked: Any, unasked: tuple[str, ...] = ()) -> None:
    """Warn if a model keeps settings that differ from the ones asked for."""
    for name, value in vars(asked).items():
        if name not in unasked and getattr(kept, name) != value:
            logger.warning(
                f"{name_of(model) or 'the model'} was made with {name}={getattr(kept, name)!r} and keeps it; asked for: "
                f"{value!r}"
            )


def attach_saved(model: PreTrainedModel, method: Method, attach: Callable[[Any], Any], token: str | None) -> bool:
    """Restore the attached modules of a model that its class could not load from its folder.

    Args:
        attach: attaches the modules; called with the settings from the folder.
        token: for the hub.

    Returns:
        Whether the folder has such modules.

    Raises:
        ValueError: the folder lacks a tensor, holds NaN, or is not known.
    """
    if is_peft_model(model):
        return False
    name, saved = name_of(model), getattr(model.config, method.key, None)
    if saved is None and os.path.isdir(name):
        saved = read_saved(name, method.name, token).settings
    if saved is None:
        return False
    if not name:
        raise ValueError(
            f"the model's configuration names {', '.join(method.modules)}, but it lacks them and its folder is unknown: "
            f"load it from where it was saved, or delete model.config.{method.key} to start with new ones"
        )
    with torch.random.fork_rng(devices=[]):  # the random values are replaced below
        attach(read_settings(saved, name, method))
    load_modules(model, name, method.modules, token)
    return True


@contextlib.contextmanager
def keeping_master_weights(trainer: Any, model: PreTrainedModel | str) -> Iterator[None]:
    """Keep the float32 weights of small modules while the trainer's parent constructor runs.

    TRL 1.15 casts everything that is trained beside 4- or 8-bit weights to bfloat16 by `param.data`, which a module
    cannot prevent.
    """
    before = {}
    if not isinstance(model, str):
        narrow = widen(model)
        if narrow:
            logger.warning(
                f"{narrow[0]} and {len(narrow) - 1} more were cast to half precision, where small updates round to "
                "zero; they are float32 again, but the lost digits stay lost"
            )
        before = {parameter: parameter.detach().clone() for parameter in master_weights(model).values()}
    yield
    if not isinstance(model, PeftModel):  # the parent's constructor may have applied PEFT
        before |= copied_by_peft(trainer.model)
    widen(trainer.model, before)
    if trainer.is_deepspeed_enabled:  # it casts the whole model and keeps its own float32 weights
        for module in trainer.model.modules():
            if isinstance(module, MasterWeights):
                module.kept = False


def on_unsloths_trainer() -> bool:
    """Whether `trl.SFTTrainer` is the one that Unsloth generated."""
    return trl.SFTTrainer.__name__ != "SFTTrainer"


def check_name(model: PreTrainedModel | str) -> None:
    """Raise a ValueError for a model name under Unsloth: its trainer does not load models by name."""
    if isinstance(model, str) and on_unsloths_trainer():
        raise ValueError(
            f"model={model!r}: Unsloth has replaced TRL's trainer, and Unsloth's takes no model names; load the model "
            "with AutoModelForCausalLM"
        )


def check_arguments(given: dict[str, Any]) -> None:
    """Raise a ValueError if a trainer argument is a path where a function or dataset is needed, or a dataset without
    rows.

    Args:
        given: the trainer's arguments by name.
    """
    rewards = given.get("reward_funcs")
    for reward in rewards if isinstance(rewards, list) else [rewards]:
        if reward is not None and not isinstance(reward, str) and not callable(reward):
            raise ValueError(
                f"reward_funcs={rewards!r}: give a function, a reward model or the name of its folder as a str, or a list "
                "of these"
            )
    for name in ("train_dataset", "eval_dataset"):
        dataset = given.get(name)
        if isinstance(dataset, str | os.PathLike):
            raise ValueError(f"{name}={dataset!r}: give the dataset itself; datasets.load_dataset reads files")
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"{name}: has no rows")


def check_left(dataset: Any, name: str, max_length: int | None) -> None:
    """Raise a ValueError if the preparation has removed every row of a dataset."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{name}: no row is left: max_length={max_length} cuts off every completion; raise it")


def check_positions(model: PreTrainedModel, dataset: Any, name: str, packing: bool = False) -> None:
    """Raise a ValueError at the first tokenized row that is longer than the model's table of positions (GPT-2).

    Without this check the run would end with an IndexError, on a GPU with a device assert. Packed rows restart their
    positions.
    """
    known = isinstance(dataset, Dataset) and isinstance(model, PreTrainedModel | PeftModel)
    if packing or not known or learned_positions(model) is None:
        return
    most = model.config.get_text_config().max_position_embeddings
    columns = [column for column in TOKENIZED if column in dataset.column_names]
    for column in columns:
        rows = dataset.select_columns(column).with_format("arrow")
        lengths = pa.chunked_array(pc.list_value_length(part[column].combine_chunks()) for part in rows.iter(1000))
        at = pc.index(pc.greater(lengths, most), True).as_py()
        if at >= 0:
            raise ValueError(
                f"{name}, row {at}: {lengths[at]} tokens, more than the {most} positions of "
                f"{name_of(model) or 'the model'}; lower max_length, or leave the row out"
            )


def check_reference(given: dict[str, Any]) -> None:
    """Raise a ValueError for an adapter for which the reference of beta > 0 would not be the initial model.

    TRL 1.15 disables a new adapter to get the reference. For a `PeftModel` it copies the adapter "default" into a new
    one called "ref", whichever adapter is trained.
    """
    model, beta = given.get("model"), getattr(given.get("args"), "beta", None)
    if not beta or given.get("ref_model"):
        return
    begins = str(getattr(given.get("peft_config"), "init_lora_weights", ""))
    if begins.partition("_")[0].lower() in TAKEN_FROM_THE_BASE:
        raise ValueError(
            f"peft_config: init_lora_weights={begins!r} initialises the adapter from the model's weights and changes them. "
            f"With beta={beta} the reference is the model without the adapter: leave this out, or set beta=0.0"
        )
    if not isinstance(model, PeftModel) or given.get("peft_config"):
        return
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"the model's active adapter is {', '.join(model.active_adapters)!r}, but with beta={beta} the reference is "
            "copied from the one called 'default': load the adapter with adapter_name=\"default\", or set beta=0.0"
        )


def give_head_a_bias(model: torch.nn.Module) -> None:
    """Give the output head the attribute `bias` that TRL 1.15 reads.

    PEFT wraps a head that is tied to an embedding with trainable tokens, and its wrapper has no `bias`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()  # a custom module has no such method
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        vars(head)["bias"] = getattr(
            head.original_module, "bias", None
        )  # not setattr: it would register the parameter twice


def check_model_and_tokenizer(model: Any, tokenizer: Any, method: str | None) -> None:
    """Check a trainer's model and tokenizer before they are loaded.

    Args:
        model: the model to train, or its name.
        tokenizer: the tokenizer that was given; None: the one saved with the model.
        method: the latent reasoning method that the trainer attaches.

    Raises:
        ValueError: there is no such model, it is an adapter, it is not a causal language model, it belongs to another
            method whose modules would be lost or are lost already, or its folder has no tokenizer.
    """
    if isinstance(model, str):
        check_causal_lm(model, method)
        if read_saved(model, method).adapter is not None:
            raise ValueError(
                f"model={model!r} is an adapter, which TRL does not load by name: merge it (merge_and_unload), save the "
                "result and name its folder; or pass PeftModel.from_pretrained(base_model, folder, is_trainable=True)"
            )
    elif isinstance(model, PreTrainedModel | PeftModel):
        check_whole(model, "the model")
        saved_with, _ = method_of(model.config)
        if saved_with and saved_with.name != method and settings_of(model, saved_with) is None:
            raise ValueError(
                f"the model was saved with the {saved_with.what} of the method {saved_with.name}, and the loader dropped "
                f"them: load it with unsloth_ext.{saved_with.loader}.from_pretrained, or delete "
                f"model.config.{saved_with.key} to train what is left"
            )
    if tokenizer is None and (isinstance(model, str) or hasattr(getattr(model, "config", None), "_name_or_path")):
        check_tokenizer(name_of(model))


def is_adapted(model: PreTrainedModel | PeftModel | str, peft_config: PeftConfig | None) -> bool:
    """Whether a trainer with these arguments trains an adapter."""
    return peft_config is not None or (not isinstance(model, str) and is_peft_model(model))


def check_whole(model: torch.nn.Module, what: str) -> None:
    """Raise a ValueError if ZeRO-3 has split a model's weights already."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            f"ZeRO-3 has split the weights of {what}, because it was loaded after the trainer's arguments were made: give "
            "its name, or load it before you make the arguments"
        )


def with_adapter(
    model: PreTrainedModel | str, peft_config: PeftConfig | None, seed: int
) -> tuple[PreTrainedModel | str, PeftConfig | None]:
    """The model and `peft_config` to pass to `SFTTrainer.__init__`. Unsloth's trainer ignores `peft_config`, so it is
    applied here."""
    if peft_config is None or not on_unsloths_trainer():
        return model, peft_config
    set_seed(seed)
    return get_peft_model(model, peft_config), None


def no_router_loss(trainer: trl.SFTTrainer, why: str) -> None:
    """Raise a ValueError if the trainer would add the load-balancing loss of a mixture of experts.

    transformers computes that loss with one mask for all layers, which does not hold for several passes.
    """
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: {why}, so the load-balancing loss of experts cannot be "
            "computed; set router_aux_loss_coef=0.0"
        )


def name_of(model: PreTrainedModel | str) -> str:
    """The folder or hub id that a model comes from, or the name itself; empty if unknown."""
    return model if isinstance(model, str) else model.config._name_or_path


def default_args(model: PreTrainedModel | str, config_class: type, name: str) -> Any:
    """The default configuration of a trainer. As in TRL, its output folder is named after the model and the method."""
    return config_class(f"{name_of(model).split('/')[-1]}-{name.replace(' ', '-')}")
