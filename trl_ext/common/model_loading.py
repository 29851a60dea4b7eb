"""How a model comes into an SFT trainer: TRL's own, or the one that Unsloth puts in its place when it is imported first."""

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
from unsloth_ext.common.settings_file import read_saved


logger = logging.get_logger(__name__)

TOKENIZED = ("input_ids", "plan_ids", "text_ids")  # columns of rows that have been prepared
TAKEN_FROM_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin LoRA that change the weights beneath it


@contextlib.contextmanager
def preparing_models(init: Callable, prepare: Callable[[PreTrainedModel], Any] = lambda _: None) -> Iterator[None]:
    """While open, the trainer whose `__init__` this is checks every model that it loads by name, and reward models'
    tokenizers. It calls `prepare(model)` on each language model, not on reward models.

    Raises:
        ValueError: its files lack tensors, which TRL 1.15 would draw at random, or hold NaN; or they lack the tokenizer.
    """

    def check_and_prepare(model: PreTrainedModel, name: str, missing: list[str]) -> None:
        check_model(model, name, missing)
        prepare(model)

    with watching_models(init, check_and_prepare), loading_reward_models(init, load_classifier, load_tokenizer):
        yield


def attach_method(
    model: PreTrainedModel,
    method: Method,
    attach: Callable[[Any], Any],
    asked: Any,
    token: str | None,
    seed: int,
    unasked: tuple[str, ...] = (),
) -> bool:
    """Give a model the modules of a method: those it was saved with, or new ones. A model that has them keeps them.

    Args:
        model: to train, wrapped by PEFT or not.
        attach: attaches the modules; called with the settings, those of the model's folder or `asked`.
        asked: the settings that the trainer's configuration asks for.
        token: for the hub.
        seed: of new modules. The global random state stays as it is.
        unasked: settings that the configuration leaves open.

    Returns:
        Whether the modules are new.

    Raises:
        ValueError: the model's adapter would leave the modules untrained, or was made before them; or the folder that the
            model comes from lacks a tensor of theirs.
    """
    if settings_of(model, method) is None:
        attach_saved(model, method, attach, token)
    if settings_of(model, method) is None:
        if is_peft_model(model):
            raise ValueError(
                f"the model is wrapped by PEFT and has no {method.what}: pass the bare model with peft_config"
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
    """Warn of settings that a model was made with and keeps, where others are asked for."""
    for name, value in vars(asked).items():
        if name not in unasked and getattr(kept, name) != value:
            logger.warning(
                f"{name_of(model) or 'the model'} was made with {name}={getattr(kept, name)!r} and keeps it; asked for: "
                f"{value!r}"
            )


def attach_saved(model: PreTrainedModel, method: Method, attach: Callable[[Any], Any], token: str | None) -> bool:
    """Give a model back the modules that its folder has and its class, which does not know them, has left there.

    Args:
        attach: attaches the modules; called with the settings dataclass that the folder says.
        token: for the hub.

    Returns:
        Whether there were any to give.

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
            f"the model's configuration speaks of {', '.join(method.modules)}, which the model lacks, and names no folder: "
            f"load it from where it was saved, or delete model.config.{method.key} to begin with new ones"
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn is not kept
        attach(read_settings(saved, name, method))
    load_modules(model, name, method.modules, token)
    return True


@contextlib.contextmanager
def keeping_master_weights(trainer: Any, model: PreTrainedModel | str) -> Iterator[None]:
    """While open, the trainer's parent constructs; small modules leave as they came, in float32.

    TRL 1.15 casts all that trains beside 4- or 8-bit weights to bfloat16, by `param.data`, which no module can refuse.
    """
    before = {}
    if not isinstance(model, str):
        narrow = widen(model)
        if narrow:
            logger.warning(
                f"{narrow[0]} and {len(narrow) - 1} more were cast to half precision, in which small steps round to "
                "nothing: they are float32 again, with the digits that are left"
            )
        before = {parameter: parameter.detach().clone() for parameter in master_weights(model).values()}
    yield
    if not isinstance(model, PeftModel):  # PEFT came while the parent constructed
        before |= copied_by_peft(trainer.model)
    widen(trainer.model, before)
    if trainer.is_deepspeed_enabled:  # which casts the whole model, and has float32 master weights of its own
        for module in trainer.model.modules():
            if isinstance(module, MasterWeights):
                module.kept = False


def on_unsloths_trainer() -> bool:
    """Whether `trl.SFTTrainer` is Unsloth's."""
    return trl.SFTTrainer.__name__ != "SFTTrainer"


def check_name(model: PreTrainedModel | str) -> None:
    """Raises a ValueError for a model's name, which Unsloth's trainer does not load."""
    if isinstance(model, str) and on_unsloths_trainer():
        raise ValueError(
            f"model={model!r}: Unsloth's trainer, which is live since Unsloth was imported, takes no names; load the model "
            "with AutoModelForCausalLM"
        )


def check_arguments(given: dict[str, Any]) -> None:
    """Raises a ValueError for a path, among a trainer's arguments by name, where a function or a dataset belongs, and for
    a dataset without rows."""
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
            raise ValueError(f"{name}: not one row")


def check_left(dataset: Any, name: str, max_length: int | None) -> None:
    """Raises a ValueError for a dataset of which the preparation has left nothing."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{name}: no row is left, max_length={max_length} leaves nothing of any completion; raise it")


def check_positions(model: PreTrainedModel, dataset: Any, name: str, packing: bool = False) -> None:
    """Raises a ValueError at the first tokenized row that is longer than a model's table of positions (GPT-2), which would
    end a run with an IndexError, on a GPU with a device assert. Packed rows count their positions anew."""
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
    """Raises a ValueError for an adapter with which the reference of beta > 0 would not be the model that is trained, as it
    begins.

    TRL 1.15 takes a new adapter off, and of a `PeftModel` copies the adapter "default" into a new one, "ref", whichever
    adapter is trained.
    """
    model, beta = given.get("model"), getattr(given.get("args"), "beta", None)
    if not beta or given.get("ref_model"):
        return
    begins = str(getattr(given.get("peft_config"), "init_lora_weights", ""))
    if begins.partition("_")[0].lower() in TAKEN_FROM_THE_BASE:
        raise ValueError(
            f"peft_config: init_lora_weights={begins!r} takes the adapter's first weights out of the model's, and with "
            f"beta={beta} the reference is the model without the adapter: leave it out, or set beta=0.0"
        )
    if not isinstance(model, PeftModel) or given.get("peft_config"):
        return
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"the model's adapter in use is {', '.join(model.active_adapters)!r}, and with beta={beta} the reference is "
            "made of the one called 'default': load the adapter with adapter_name=\"default\", or set beta=0.0"
        )


def give_head_a_bias(model: torch.nn.Module) -> None:
    """PEFT's wrapper of a head that is tied to an embedding of which single tokens are trained has no `bias`, which TRL
    1.15 reads beside its `weight`."""
    head = getattr(model, "get_output_embeddings", lambda: None)()  # a module of one's own has none
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        vars(head)["bias"] = getattr(head.original_module, "bias", None)  # a parameter has its name already


def check_model_and_tokenizer(model: Any, tokenizer: Any, method: str | None) -> None:
    """What can be said of a trainer's model before it is loaded.

    Args:
        model: to train, or its name.
        tokenizer: that was given; None: the one that was saved with the model.
        method: of latent reasoning that the trainer attaches.

    Raises:
        ValueError: there is no such model, it is an adapter, no causal language model, or of another method, which would
            be lost; or there is no tokenizer in its folder.
    """
    if isinstance(model, str):
        check_causal_lm(model, method)
        if read_saved(model, method).adapter is not None:
            raise ValueError(
                f"model={model!r} is an adapter, which TRL does not open by name: merge it (merge_and_unload), save that "
                "and name its folder; or pass PeftModel.from_pretrained(base_model, folder, is_trainable=True)"
            )
    if tokenizer is None and (isinstance(model, str) or hasattr(getattr(model, "config", None), "_name_or_path")):
        check_tokenizer(name_of(model))


def with_adapter(
    model: PreTrainedModel | str, peft_config: PeftConfig | None, seed: int
) -> tuple[PreTrainedModel | str, PeftConfig | None]:
    """The model and the `peft_config` for `SFTTrainer.__init__`. Unsloth's trainer ignores the latter: applied here."""
    if peft_config is None or not on_unsloths_trainer():
        return model, peft_config
    set_seed(seed)
    return get_peft_model(model, peft_config), None


def no_router_loss(trainer: trl.SFTTrainer, why: str) -> None:
    """Raises a ValueError if the trainer was built with a loss that balances a mixture's experts, which transformers counts
    over one mask for all layers and passes."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: {why}, and the loss that balances experts cannot be "
            "counted; set router_aux_loss_coef=0.0"
        )


def name_of(model: PreTrainedModel | str) -> str:
    """Where a model, or the path of one, comes from; empty if nobody knows."""
    return model if isinstance(model, str) else model.config._name_or_path


def default_args(model: PreTrainedModel | str, config_class: type, name: str) -> Any:
    """A trainer's configuration where none is given: as TRL's, it leaves files in a folder named after model and method."""
    return config_class(f"{name_of(model).split('/')[-1]}-{name.replace(' ', '-')}")
