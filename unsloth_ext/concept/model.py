"""`ConceptModel`, a model that compresses, with its tokenizer."""

from typing import Any

import torch

from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import check_context, grouped, left_padded, refuse_empty, settle, with_tokenizer
from ..common.method_model import MethodModel
from ..common.wrapping import backbone_of
from .config import OnlineConceptConfig
from .method import METHOD


class ConceptModel(MethodModel):
    """A model with concepts and its tokenizer.

    Attributes:
        model: the causal LM, or a `PeftModel` if an adapter was loaded. `model.generate` compresses by itself.
        tokenizer: pads on the left.
    """

    method = METHOD

    @property
    def config(self) -> OnlineConceptConfig:
        """How the model compresses."""
        return backbone_of(self.model).concept_config

    @torch.no_grad()
    def generate(self, prompts: str | list[str], **kwargs: Any) -> Any:
        """Continue texts.

        Args:
            prompts: a text or several.
            **kwargs: as for `model.generate`. docs/generation.md lists what works.

        Returns:
            A continuation for a text, a list for several texts. With `num_return_sequences` > 1 each is a list. With
            `return_dict_in_generate` what `model.generate` returns.

        Raises:
            ValueError: an argument does not work with concepts; or a prompt is empty or leaves no room for the answer.
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
        """Return the pieces of a text that became concepts, in order, as (piece, codewords). A tail without a concept
        has [].
        """
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
