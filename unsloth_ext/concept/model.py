"""`ConceptModel`: load a model that compresses, and let it write."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..hub import base_of, load_adapter, load_full, load_modules, read_json
from ..mode import evaluating
from ..residual import backbone_of
from .config import OnlineConceptConfig
from .modules import CONCEPT_MODULES, attach_concepts, has_concepts, read_settings, remember_concepts


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
            **kwargs: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ValueError: nothing there says how the model compresses, or its files are damaged, lack tensors or hold NaN.
        """
        adapter = read_json(name, "adapter_config.json", token)
        base = name if adapter is None else base_of(adapter, name)
        if os.path.isdir(name) and not Path(name, "tokenizer_config.json").exists():
            raise ValueError(f"{name} has no tokenizer_config.json: the tokenizer was not saved with the model")
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", token=token)
        full = adapter is None and "concepts" in (read_json(name, "config.json", token) or {})
        model = (load_full if full else AutoModelForCausalLM.from_pretrained)(base, token=token, **kwargs)
        saved = getattr(model.config, "concepts", None) if adapter is None else adapter.get("concepts")
        if not saved:
            raise ValueError(f"{name} does not say how it compresses: it was not saved by a concept trainer")
        attach_concepts(model, read_settings(saved, name))
        if adapter is not None:
            model = load_adapter(model, name, is_trainable=True, token=token)
            remember_concepts(model)
        else:
            load_modules(model, name, CONCEPT_MODULES, token)
        return cls(model.eval(), tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Model (or adapter) and tokenizer, in safetensors and JSON."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def generate(self, prompts: str | list[str], **kwargs: Any) -> Any:
        """What comes after a text, or after each of several; keywords as for `model.generate`."""
        if isinstance(prompts, str):
            return self.generate([prompts], **kwargs)[0]
        if not len(prompts):
            return []
        batch = self.tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(
            self.model.device
        )
        kwargs.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        with evaluating(self.model):
            out = self.model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **kwargs)
        return self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

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
