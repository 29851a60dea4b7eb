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
    """Make each tag a token of its own, in place, wherever it stands in a text.

    Returns:
        The ids of all tags, and those of them that the vocabulary did not have.

    Raises:
        ValueError: the tokenizer reads a tag in another way all the same.
    """
    known = tokenizer.get_vocab()
    # A token of the vocabulary may still be split in a text, by what stands beside it; an added one never is
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
    """Embeddings for the tags that are new to a model, near the mean of the others; a PEFT config, in place, trains them.

    Args:
        ids, added: see `add_tags`.

    Raises:
        ValueError: PEFT would leave them untrained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    new = [index for index in ids if index in added or index >= rows]
    if not new:
        return
    names = ", ".join(tokenizer.convert_ids_to_tokens(new))
    if is_peft_model(model):
        raise ValueError(
            f"tags: {names} would be new to a model that PEFT has wrapped; pass the bare model, peft_config"
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
    tied = head is None or head.weight is embedding.weight  # then PEFT trains the one for both
    whole = [x for x in (embedding, head) if x is not None and named(peft_config.modules_to_save, _full_name(model, x))]
    single = [x for x in ([embedding] if tied else [embedding, head]) if x not in whole]
    check_rows(peft_config, model, "the new tokens'", single)
    for module in single:
        name = _name(model, module)
        found = {**found, name: [*dict.fromkeys([*found.get(name, ()), *new])]}
    peft_config.trainable_token_indices = found or None


def _name(model: nn.Module, module: nn.Module) -> str:
    """Of a submodule, its last part, which is how PEFT's configs name it."""
    return _full_name(model, module).rpartition(".")[2]


def _full_name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def check_tags_are_trained(dataset: Dataset, ids: list[int], tags: list[str]) -> None:
    """Raises a ValueError if no row of a tokenized dataset has a tag among its labels."""
    if not any(np.isin(row["labels"][1:], ids).any() for row in dataset.select_columns("labels")):
        raise ValueError(
            f"train dataset: none of {', '.join(tags)} is a trained token of any row; write them in the completions (rows "
            "that were tokenized before must have been with these tokens), or use SFTTrainer"
        )
