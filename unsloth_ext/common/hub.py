"""Loading models and tokenizers from folders and the hub, with checks that name what is missing or damaged."""

import logging
import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import patches

from .log_filter import showing_only
from .settings_file import ADAPTER, METHODS, TENSORS, held_by, read_json, read_saved, safetensors_keys
from .wrapping import backbone_of


MODELING = logging.getLogger("transformers.modeling_utils")
DTYPES = ("float32", "float16", "bfloat16", "float64")
TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)  # at least one of them
DECODERS = ("CausalLM", "LMHeadModel", "ConditionalGeneration")  # endings of their class names


def as_dtype(dtype: torch.dtype | str | None, others: dict[str, Any] | None = None) -> torch.dtype | str | None:
    """Return a torch dtype for its name. None and "auto", the checkpoint's own dtype, are returned as they are.

    Args:
        dtype: a dtype, its name, "auto" or None.
        others: further keywords. `torch_dtype`, the old name in transformers, is removed from them and used.

    Returns:
        The dtype, "auto" or None.

    Raises:
        ValueError: torch has no such floating-point dtype, or both names were given.
    """
    former = (others or {}).pop("torch_dtype", None)
    if former is not None and dtype is not None:
        raise ValueError(f"dtype={dtype!r} and torch_dtype={former!r}: they are the same setting; give only dtype")
    dtype = former if dtype is None else dtype
    if dtype is None or dtype == "auto":
        return dtype
    found = dtype if isinstance(dtype, torch.dtype) else None
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        found = getattr(torch, dtype.removeprefix("torch."))
    if found is None or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(map(repr, DTYPES))}, 'auto'")
    return found


def check_name(
    name: str, token: str | None = None, files: tuple[str, ...] = ("config.json", "adapter_config.json")
) -> None:
    """Raise a ValueError if `name` is neither a folder with one of these files nor a hub repository."""
    if not name:
        raise ValueError("the model's name is empty: give a folder or a hub id")
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in files):
            inside = sorted({str(config.parent) for file in files for config in path.glob(f"*/{file}")})
            raise ValueError(
                f"{name} holds no model: it has neither {' nor '.join(files)}"
                + (f"; there is one in {', '.join(inside[:3])}" if inside else "")
            )
        return
    if path.is_file():
        raise ValueError(f"{name} is a file; give the folder that it is in")
    here = f"there is no folder {name} in {os.getcwd()}" if not path.is_absolute() else f"there is no folder {name}"
    if path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and path.parent.exists()):
        raise ValueError(here)
    why: Exception | None = None
    for file in files:
        try:
            hf_hub_download(name, file, token=token)
            return
        except HFValidationError as error:
            raise ValueError(f"{here}, and it is no valid name for the hub") from error
        except GatedRepoError as error:
            raise ValueError(f"{name} is gated on the hub: accept its terms there and give a token") from error
        except RepositoryNotFoundError as error:
            raise ValueError(f"{here}, and there is no such model on the hub") from error
        except EntryNotFoundError as error:
            why = why or error
            if isinstance(error, LocalEntryNotFoundError):
                break  # no connection: each further file would be retried for minutes
    if isinstance(why, LocalEntryNotFoundError):
        raise ValueError(f"{here}, and the hub cannot be reached") from why
    raise ValueError(f"{name} on the hub holds no model: it has neither {' nor '.join(files)}") from why


def check_tokenizer(name: str) -> None:
    """Raise a ValueError for a folder without a tokenizer. `AutoTokenizer` would return an empty one."""
    if os.path.isdir(name) and not any(Path(name, file).exists() for file in TOKENIZERS):
        raise ValueError(f"{name} has no tokenizer_config.json: the tokenizer was not saved with the model")


def load_tokenizer(name: str, token: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Call `AutoTokenizer.from_pretrained` with clear errors.

    Raises:
        ValueError: there is no such folder or model, or it has no tokenizer, or its files are damaged.
    """
    if not os.path.isdir(name):
        check_name(name, token, ("config.json", "adapter_config.json", "tokenizer_config.json"))
    check_tokenizer(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, token=token, **kwargs)
    except StrictDataclassError as error:
        raise ValueError(_wrong_config(name, error)) from error
    except Exception as error:  # errors of many kinds, few of which name the folder
        why = " ".join(str(error).split())
        raise ValueError(f"{name}: its tokenizer.json or tokenizer_config.json cannot be read: {why:.200}") from error
    # For some classes transformers makes one of special tokens alone, and of the class's own unknown token
    if len({*tokenizer.get_vocab()} - {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}) <= 1:
        raise ValueError(f"{name}: its tokenizer has no vocabulary: is tokenizer.json missing?")
    return tokenizer


def has_tokenizer(name: str, token: str | None = None) -> bool:
    """Return whether a tokenizer was saved with a model or adapter, a folder or a hub id."""
    if os.path.isdir(name):
        return any(Path(name, file).exists() for file in (*TOKENIZERS, "tokenizer.json"))
    return read_json(name, "tokenizer_config.json", token) is not None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise a ValueError if a tokenizer makes ids that a model has no embeddings for.

    Added tokens are not counted: some published models have one more than embeddings, which texts do not use.
    """
    rows = model.config.get_text_config().vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, and the model has embeddings for {rows}: they "
            "belong to different models"
        )


def _wrong_config(name: str, error: StrictDataclassError) -> str:
    return f"{name}/config.json: {' '.join(str(error).split())}"


def base_of(adapter: dict, name: str) -> str:
    """Return the base model that the `adapter_config.json` of `name` names.

    Raises:
        ValueError: it names none, or a folder that does not exist; or PEFT does not know the kind of adapter.
    """
    if adapter.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{name}: adapter_config.json has peft_type={adapter.get('peft_type')!r}, which PEFT does not know"
        )
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{name}: adapter_config.json has no base_model_name_or_path")
    if not os.path.isdir(base):
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise ValueError(
                f"{name}: its base_model_name_or_path {base} does not exist (from {os.getcwd()}); correct it in "
                "adapter_config.json"
            ) from error
    return base


def check_causal_lm(name: str, method: str | None = None, token: str | None = None, **remote: Any) -> None:
    """Check what is known of a model before it is loaded.

    Args:
        name: a folder or a hub id.
        method: the latent reasoning method that the caller attaches.
        token: the access token for the hub.
        **remote: `trust_remote_code`, `revision`.

    Raises:
        ValueError: there is no such model, it is no causal language model, or it is of another method, whose modules
            would be lost.
    """
    check_name(name, token)
    saved = read_saved(name, method, token)
    whole = name if saved.adapter is None else base_of(saved.adapter, name)
    if saved.adapter is not None and os.path.isdir(name) and not any(Path(name).glob("adapter_model.*")):
        raise ValueError(f"{Path(name, ADAPTER)} is missing")
    try:
        config = AutoConfig.from_pretrained(whole, token=token, **remote)
    except ValueError as error:
        if "does not recognize this architecture" not in str(error):
            raise
        kind = (read_json(whole, "config.json", token) or {}).get("model_type")
        raise ValueError(
            f"{whole}: its model_type {kind!r} is unknown to transformers {transformers.__version__}"
        ) from error
    except StrictDataclassError as error:
        raise ValueError(_wrong_config(whole, error)) from error
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if not known or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is a {config.model_type} model, which is no causal language model")


@patches.applied("zero3_loading")
def load_causal_lm(
    name: str, *, method: str | None = None, token: str | None = None, dtype: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """Call `AutoModelForCausalLM.from_pretrained` and check that every tensor is there.

    Args:
        name: a folder or a hub id.
        method: the latent reasoning method that the caller attaches. The caller loads its tensors, so transformers'
            report of them is left out.
        token: the access token for the hub.
        dtype: a dtype, its name, "auto" or None.
        **kwargs: keywords for `from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: see `check_causal_lm`; or tensors are missing or not finite, or their file is damaged.
    """
    dtype = as_dtype(dtype, kwargs)
    if dtype is not None:
        kwargs["dtype"] = dtype
    check_causal_lm(name, method, token, **{k: kwargs[k] for k in ("trust_remote_code", "revision") if k in kwargs})
    may_differ = kwargs.pop("ignore_mismatched_sizes", False)
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are named below
    try:
        with _errors_only():
            model, found = AutoModelForCausalLM.from_pretrained(name, token=token, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{name}: its safetensors are truncated or damaged ({error})") from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{name}: from_pretrained has no such keyword: {error}") from error
    others = [key for key in sorted(found["unexpected_keys"]) if held_by([key]) is None]
    if others:
        MODELING.warning(
            f"{name} holds {len(others)} tensors that {type(model).__name__} does not use: {others[0]} ..."
        )
    if len(others) < len(found["unexpected_keys"]):  # the files of a hub model are here only now
        read_saved(name, method, token)
    if found["mismatched_keys"] and not may_differ:
        key, held, wanted = sorted(found["mismatched_keys"])[0]
        raise ValueError(f"{name}: {key} has the shape {tuple(held)}, but config.json gives {tuple(wanted)}")
    check_model(model, name, found["missing_keys"])
    return model


@patches.applied("zero3_loading")
def new_causal_lm(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Call `AutoModelForCausalLM.from_config`.

    Args:
        config: the model's configuration.
        **kwargs: keywords for `from_config`, such as `dtype`.

    Returns:
        A model with random weights.
    """
    return AutoModelForCausalLM.from_config(config, **kwargs)


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add rows to the embeddings if the tokenizer has more tokens.

    transformers draws new rows around the mean of the others. Its message about that mentions an option that we do not
    have, so it is left out.
    """
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with _errors_only():
            model.resize_token_embeddings(len(tokenizer))


def _errors_only() -> AbstractContextManager[None]:
    """Return a context in which transformers' modelling code logs only errors.

    It is a filter because with a log level of WARNING or more transformers 5.17 reports "layers were not sharded" for
    every model.
    """
    return showing_only(MODELING, lambda record: record.levelno >= logging.ERROR)


def nf4(dtype: torch.dtype | str | None) -> BitsAndBytesConfig:
    """The settings of QLoRA's 4-bit weights (arXiv 2305.14314).

    Args:
        dtype: of the products. None or "auto" means bitsandbytes' default.
    """
    compute = None if dtype == "auto" else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True
    )


def check_missing(names: Iterable[str], name: str) -> None:
    """Raise a ValueError for tensors that are not in the files of `name` and that transformers drew at random."""
    if lost := sorted(names):
        raise ValueError(f"{name} lacks {lost[0]}" + f" and {len(lost) - 1} more tensors" * (len(lost) > 1))


@patches.applied("zero3_loading")
def load_classifier(name: str, flag: str = "reward_funcs: ", **kwargs: Any) -> PreTrainedModel:
    """Load a sequence classifier, such as a reward model, and check that every tensor is there.

    Args:
        name: a folder or a hub id.
        flag: the text before the name in messages.
        **kwargs: keywords for `from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: there is no such model; files lack tensors or hold NaN or infinity; the head has another number of
            logits than asked for; or it is an adapter with a head.
    """
    if not kwargs.get("subfolder"):
        check_name(name, kwargs.get("token"))
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatches are named below
    model, found = AutoModelForSequenceClassification.from_pretrained(name, **kwargs)
    # transformers 5.17 looks for a head under the name that PEFT uses in memory, and adapter files have another
    if any("modules_to_save" in key for key in found["missing_keys"]):
        raise ValueError(
            f"{flag}{name} is an adapter, whose head transformers would leave out: merge it into its base model "
            "(merge_and_unload), save that, and give its folder"
        )
    if others := sorted(found["mismatched_keys"]):
        key, held, wanted = others[0]
        raise ValueError(
            f"{flag}{name}: {key} has the shape {tuple(held)} where a classifier of {model.config.num_labels} logit(s) has "
            f"{tuple(wanted)}"
        )
    check_missing(found["missing_keys"], f"{flag}{name}")
    check_finite(model.state_dict(), f"{flag}{name}")
    return model


def check_model(model: PreTrainedModel, name: str, missing: Iterable[str] = ()) -> None:
    """Raise a ValueError for NaN or infinity in a model, for an encoder, and for tensors that its files lack."""
    check_finite(dict(model.named_parameters()), name)
    _check_causal(model, name)  # an encoder's files lack the head of a decoder
    check_missing(missing, name)


@torch.no_grad()
def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise a ValueError for an encoder. It also opens as a causal LM, but reads the tokens that it should predict."""
    if any(decoder in kind for kind in model.config.architectures or () for decoder in DECODERS):
        return
    ids = torch.tensor([[1, 2], [1, 3]], device=model.get_input_embeddings().weight.device)
    logits = getattr(model.eval()(input_ids=ids), "logits", None)  # TRL opens the class that the configuration names
    first = None if logits is None else logits[:, 0].float()
    if first is None or not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{name} is no causal language model ({', '.join(model.config.architectures or ['?'])}): what it predicts at a "
            "token depends on later tokens, as in an encoder"
        )


def check_finite(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Raise a ValueError that names a tensor of `name` with NaN or infinity."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{name}: {key} holds NaN or infinity")


def saved_settings(name: str, method: str, token: str | None = None) -> Any:
    """Return the settings of `method` that a model, or the base of an adapter, was saved with; None if there are none.

    Raises:
        ValueError: there is no such model, or it is of another method.
    """
    check_name(name, token)
    saved = read_saved(name, method, token)
    if saved.settings or saved.adapter is None:
        return saved.settings
    return read_saved(base_of(saved.adapter, name), method, token).settings


def load_modules(model: PreTrainedModel, name: str, names: tuple[str, ...], token: str | None) -> None:
    """Fill submodules of the decoder, in place, from the safetensors files of a full model.

    Tensors in `latent_reasoning.safetensors` take precedence.

    Args:
        model: the model to fill.
        name: a folder or a hub id.
        names: the submodules.
        token: the access token for the hub.

    Raises:
        ValueError: a tensor is missing.
    """
    backbone = backbone_of(model)
    wanted = {k: v for k, v in backbone.state_dict().items() if k.split(".")[0] in names}
    folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns="*.safetensors", token=token)
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors"), key=lambda file: (file.name == TENSORS, file)):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                short = key.removeprefix(f"{model.base_model_prefix}.")
                if short in wanted:
                    found[short] = tensors.get_tensor(key)
    missing = wanted.keys() - found.keys()
    if missing:
        raise ValueError(f"{name} has settings for modules, but lacks {', '.join(sorted(missing))}")
    check_finite(found, name)
    backbone.load_state_dict(found, strict=False)


def load_adapter(model: nn.Module, name: str, **kwargs: Any) -> PeftModel:
    """Call `PeftModel.from_pretrained` and check that every tensor of the adapter is there.

    Older folders have our settings in `adapter_config.json`; PEFT's warning about them is left out.

    Raises:
        ValueError: the adapter's file is missing or damaged, lacks tensors or holds NaN.
    """
    saved = adapter_keys(name, kwargs.get("token"))
    with warnings.catch_warnings():
        ours = "(" + "|".join(f"'{method.key}'" for method in METHODS.values()) + "|, )+"
        warnings.filterwarnings("ignore", message=rf"Unexpected keyword arguments \[{ours}\]")
        try:
            loaded = PeftModel.from_pretrained(model, name, **kwargs)
        except KeyError as error:  # PEFT looks some tensors up by name
            raise ValueError(f"{name}: {ADAPTER} lacks {error}") from error
        except RuntimeError as error:  # the shapes differ
            raise ValueError(f"{name}: {ADAPTER} does not fit the model: {error}") from error
    wanted = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    missing = sorted(wanted.keys() - saved)
    if missing:
        raise ValueError(
            f"{name}: {ADAPTER} lacks {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    check_finite(wanted, name)
    return loaded


def adapter_keys(name: str, token: str | None) -> set[str]:
    """Return the names of the tensors in the file of an adapter folder or hub repository.

    Raises:
        ValueError: see `load_adapter`.
    """
    path = Path(name, ADAPTER) if os.path.isdir(name) else Path(hf_hub_download(name, ADAPTER, token=token))
    if not path.exists():
        raise ValueError(f"{path} is missing")
    return set(safetensors_keys(path))
