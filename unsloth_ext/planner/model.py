"""Generation from plans, and `PlannerExecutorModel` (ours)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from ..common.attaching import check_adapter
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import check_context, context_of, grouped, left_padded, settle, with_tokenizer
from ..common.method_model import MethodModel
from ..common.question_ids import question_ids
from ..common.wrapping import backbone_of
from .executor import Prefix, executor_prefix
from .head import text_embeds
from .method import METHOD
from .planning import plan


@contextlib.contextmanager
def writing_after(model: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Make `model.generate` on the embeddings of a prefix work as the executor, inside the context.

    The caller passes positions that end at the largest quota. `generate` counts on from there, so text begins at the
    next position. Here the last slot of the prefix gets its true position, and tokens get the type embedding of text.
    """
    backbone = backbone_of(model)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if kwargs.get("inputs_embeds") is None:
            return args, {**kwargs, "input_ids": None, "inputs_embeds": text_embeds(backbone, kwargs["input_ids"])}
        positions = kwargs["position_ids"].clone()
        positions[:, -1] = prefix.positions[:, -1].repeat_interleave(len(positions) // len(prefix.positions))
        return args, {**kwargs, "position_ids": positions}

    handle = backbone.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def execute_plan(model: PreTrainedModel | PeftModel, plan: torch.Tensor, **generate_kwargs: Any) -> Any:
    """Generate text from plans with `model.generate`.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        plan (B, n, Q): long, see `unsloth_ext.planner.vocabulary`.
        **generate_kwargs: as for `generate`. docs/generation.md lists what works.

    Returns:
        What `generate` returns for a prompt of embeddings: only new tokens (B, C) long, or a dictionary with them.

    Raises:
        ValueError: `plan` does not fit the model's settings; an argument does not work with plans; or there are more
            tokens than the model has positions.
    """
    settings = settle(model, "planner", generate_kwargs)
    check_context(model, [0] * len(plan), settings, around=backbone_of(model).planner_config.max_quota + 1)
    prefix = executor_prefix(model, plan)
    positions = prefix.positions.clone()
    positions[:, -1] = backbone_of(model).planner_config.max_quota
    if settings.repetition_penalty not in (None, 1.0):
        # transformers 5.24 leaves as many new tokens unpenalised as a prompt of embeddings has padding
        ours = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
        given = generate_kwargs.get("logits_processor") or ()
        generate_kwargs |= {"repetition_penalty": 1.0, "logits_processor": LogitsProcessorList([ours, *given])}
    with evaluating(model), writing_after(model, prefix):
        return model.generate(
            inputs_embeds=prefix.embeds, attention_mask=prefix.mask.long(), position_ids=positions, **generate_kwargs
        )


class PlannerExecutorModel(MethodModel):
    """A model with a planner and its tokenizer, for planning and writing.

    Args:
        model: the causal LM, or a `PeftModel` around it.
        tokenizer: its tokenizer, with padding on the left.

    Attributes:
        model: as given.
        tokenizer: as given.

    Raises:
        ValueError: the model has no planner, or its adapter leaves the planner untrained.
    """

    method = METHOD

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        if isinstance(model, PeftModel):
            check_adapter(model, METHOD)

    def plan(self, texts: str | list[str], **kwargs: Any) -> torch.Tensor:
        """Plan for texts, greedily by default.

        Args:
            texts: a text or several.
            **kwargs: as for `unsloth_ext.plan`.

        Returns:
            Plans (B, n, Q) long.

        Raises:
            ValueError: a text has more tokens than the model has positions.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = [question_ids(self.tokenizer, text) for text in texts]
        context = context_of(self.model)
        for i, row in enumerate(rows):
            if context is not None and len(row) > context:
                raise ValueError(
                    f"text {i} has {len(row)} tokens: more than the model's {context} positions; shorten it"
                )
        batch = left_padded(self.tokenizer, rows)
        return plan(self.model, **{k: v.long().to(self.model.device) for k, v in batch.items()}, **kwargs)

    def execute(self, plan: torch.Tensor, **generate_kwargs: Any) -> Any:
        """Write texts from plans.

        Args:
            plan (B, n, Q): long.
            **generate_kwargs: as for `generate`.

        Returns:
            A text for each plan. With `num_return_sequences` > 1 a list of texts for each. With
            `return_dict_in_generate` what `execute_plan` returns.
        """
        if not len(plan):
            return []
        generate_kwargs = with_tokenizer(self.tokenizer, generate_kwargs)
        settings = settle(self.model, "planner", generate_kwargs)
        out = execute_plan(self.model, plan, **generate_kwargs)
        if settings.return_dict_in_generate:
            return out
        return grouped(self.tokenizer.batch_decode(out, skip_special_tokens=True), len(plan))

    def generate(self, texts: str | list[str], **generate_kwargs: Any) -> Any:
        """Plan greedily, then write texts from the plans alone.

        Args:
            texts: a text or several.
            **generate_kwargs: as for `generate`.

        Returns:
            An answer for a text, a list of answers for several texts, as from `execute`.
        """
        if isinstance(texts, str):
            found = self.generate([texts], **generate_kwargs)
            return found[0] if isinstance(found, list) else found
        return self.execute(self.plan(texts), **generate_kwargs) if texts else []
