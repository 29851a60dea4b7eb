"""Tags as single tokens: in the tokenizer, in the embeddings, and trained under PEFT."""

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_ext.common.embedding_rows import check_rows, named
from unsloth_ext.common.hub import fit_embeddings


def add_tags(tokenizer: PreTrainedTokenizerBase, tags: list[str]) -> tuple[list[int], list[int]]:
    """Make each tag a single token of the tokenizer, in place, in any context.

    Returns:
        The ids of all tags, and the ids of those that are new to the vocabulary.

    Raises:
        ValueError: the tokenizer still splits a tag.
    """
    known = tokenizer.get_vocab()
    # A token of the vocabulary may be split depending on its neighbours; an added token never is
    loose = [tag for tag in tags if tag not in tokenizer.get_added_vocab()]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in loose])
    ids = tokenizer.convert_tokens_to_ids(tags)
    for tag, index in zip(tags, ids, strict=True):
        if tokenizer.encode(f"{tag}{tag}", add_special_tokens=False).count(index) != 2:
            raise ValueError(
                f"tags: {type(tokenizer).__name__} does not read {tag!r} as one token, even when it is added"
            )
    return ids, [index for tag, index in zip(tags, ids, strict=True) if tag not in known]


def give_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    added: list[int],
    peft_config: PeftConfig | None,
    seed: int,
) -> None:
    """Add embeddings for tags that are new to a model, close to the mean embedding, and let a PEFT config train them.

    Args:
        model: the model to change.
        tokenizer: the tokenizer with the tags.
        ids, added: the results of `add_tags`.
        peft_config: changed in place; None: without PEFT.
        seed: seed of the new embeddings.

    Raises:
        ValueError: PEFT would leave the new embeddings untrained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    new = [index for index in ids if index in added or index >= rows]
    if not new:
        return
    names = ", ".join(tokenizer.convert_ids_to_tokens(new))
    if is_peft_model(model):
        raise ValueError(
            f"tags: {names} are new, but PEFT has wrapped the model already; pass the unwrapped model and peft_config"
        )
    if peft_config is not None and not hasattr(peft_config, "trainable_token_indices"):
        raise ValueError(
            f"{type(peft_config).__name__} would leave the embeddings of the new tokens {names} untrained; use LoRA, or "
            "train the whole model"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fit_embeddings(model, tokenizer)
    if peft_config is not None:
        _train_rows(peft_config, model, new)


def _train_rows(peft_config: PeftConfig, model: PreTrainedModel, new: list[int]) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = peft_config.trainable_token_indices
    if not isinstance(found, dict):
        found = {_name(model, embedding): found} if found else {}
    tied = head is None or head.weight is embedding.weight  # PEFT then trains one embedding for both
    whole = [x for x in (embedding, head) if x is not None and named(peft_config.modules_to_save, _full_name(model, x))]
    single = [x for x in ([embedding] if tied else [embedding, head]) if x not in whole]
    check_rows(peft_config, model, "the new tokens'", single)
    for module in single:
        name = _name(model, module)
        found = {**found, name: [*dict.fromkeys([*found.get(name, ()), *new])]}
    peft_config.trainable_token_indices = found or None


def _name(model: nn.Module, module: nn.Module) -> str:
    """The last part of a submodule's name, which PEFT's configs use."""
    return _full_name(model, module).rpartition(".")[2]


def _full_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def check_tags_are_trained(dataset: Dataset, ids: list[int], tags: list[str]) -> None:
    """Raise a ValueError if no row of a tokenized dataset has a tag among its labels."""
    if not any(np.isin(row["labels"][1:], ids).any() for row in dataset.select_columns("labels")):
        raise ValueError(
            f"train dataset: none of {', '.join(tags)} is a trained token of any row; write them in the completions (rows "
            "that are already tokenized must use these tokens), or use SFTTrainer"
        )
