"""`ConceptModel`: load a model that compresses, and let it write."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import check_context, grouped, left_padded, refuse_empty, settle, with_tokenizer
from ..common.hub import base_of, check_name, load_adapter, load_causal_lm, load_modules, load_tokenizer
from ..common.settings_file import read_saved
from ..common.wrapping import backbone_of
from .config import OnlineConceptConfig
from .modules import CONCEPT_MODULES, attach_concepts, has_concepts, read_settings


class ConceptModel:
    """A model with its tokenizer, loaded from the folder that a trainer wrote.

    Attributes:
        model: the causal LM, a `PeftModel` where an adapter was loaded. `model.generate` compresses by itself.
        tokenizer: padding on the left.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        if not has_concepts(model):
            raise ValueError(f"{type(model).__name__} has no concepts; call attach_concepts(model) first")
        self.model, self.tokenizer = model, tokenizer

    @property
    def config(self) -> OnlineConceptConfig:
        """How the model compresses."""
        return backbone_of(self.model).concept_config

    @classmethod
    def from_pretrained(cls, name: str, *, token: str | None = None, **kwargs: Any) -> "ConceptModel":
        """Load an adapter folder with its base, or a full model, head and embedding included.

        Args:
            name: a folder or a hub id.
            **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype="bfloat16"`.

        Raises:
            ValueError: nothing there says how the model compresses, or its files are damaged, lack tensors or hold NaN.
        """
        check_name(name, token)
        saved = read_saved(name, "concept", token)
        base = name if saved.adapter is None else base_of(saved.adapter, name)
        tokenizer = load_tokenizer(name, token, padding_side="left")
        if not saved.settings:
            raise ValueError(f"{name} does not say how it compresses: it was not saved by a concept trainer")
        model = load_causal_lm(base, method="concept", token=token, **kwargs)
        attach_concepts(model, read_settings(saved.settings, name))
        if saved.adapter is not None:
            model = load_adapter(model, name, is_trainable=True, token=token)
        else:
            load_modules(model, name, CONCEPT_MODULES, token)
        return cls(model.eval(), tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Model (or adapter) and tokenizer, in safetensors and JSON, with a model card."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def generate(self, prompts: str | list[str], **kwargs: Any) -> Any:
        """What comes after a text, or after each of several.

        Args:
            **kwargs: as for `model.generate`; docs/generation.md has what works.

        Returns:
            For a text a text, for texts a list of texts; with `num_return_sequences` > 1 a list in each text's place; with
            `return_dict_in_generate` what `model.generate` returns.

        Raises:
            ValueError: an argument that concepts do not survive, a prompt without tokens, or one that leaves no room for
                what comes after it.
        """
        if isinstance(prompts, str):
            found = self.generate([prompts], **kwargs)
            return found[0] if isinstance(found, list) else found
        if not len(prompts):
            return []
        rows = self.tokenizer(list(prompts))["input_ids"]
        refuse_empty([len(row) for row in rows])
        batch = left_padded(self.tokenizer, rows)
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        kwargs = with_tokenizer(self.tokenizer, kwargs)
        settings = settle(self.model, "concept", kwargs)
        check_context(self.model, batch["attention_mask"].sum(1).tolist(), settings)
        with evaluating(self.model):
            out = self.model.generate(**batch, **kwargs)
        if settings.return_dict_in_generate:
            return out
        texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return grouped(texts, len(prompts))

    @torch.no_grad()
    def segments(self, text: str) -> list[tuple[str, list[int]]]:
        """The pieces of a text that its concepts stand for, in order: (piece, codewords); of a tail without one, []."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.model.device)
        with evaluating(self.model):
            choice = backbone_of(self.model)(ids, use_cache=False).choice
        pieces, begin = [], 0
        for t in choice.concept[0].nonzero()[:, 0].tolist():
            pieces.append((self.tokenizer.decode(ids[0, begin : t + 1]), choice.ids[0, t].tolist()))
            begin = t + 1
        if begin < ids.shape[1]:
            pieces.append((self.tokenizer.decode(ids[0, begin:]), []))
        return pieces
