"""`PlannerExecutorModel`: load a model that plans in concepts, let it plan and write."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """While open, `model.generate` on a prefix's embeddings goes on as the executor does.

    It is given positions that end at the largest quota, from where it counts on, so that text begins at the next one; the
    last slot of the prefix gets its own position back here, and tokens the type embedding of text.
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
    """Text from plans, by `model.generate`.

    Args:
        plan (B, n, Q) long: see `vocabulary`.
        **generate_kwargs: as for `generate`; docs/generation.md has what works.

    Returns:
        What `generate` returns for a prompt of embeddings: new tokens only.

    Raises:
        ValueError: `plan` is none under the model's settings; an argument that a plan does not survive; more tokens than
            the model has positions for.
    """
    settings = settle(model, "planner", generate_kwargs)
    check_context(model, [0] * len(plan), settings, around=backbone_of(model).planner_config.max_quota + 1)
    prefix = executor_prefix(model, plan)
    positions = prefix.positions.clone()
    positions[:, -1] = backbone_of(model).planner_config.max_quota
    with evaluating(model), writing_after(model, prefix):
        return model.generate(
            inputs_embeds=prefix.embeds, attention_mask=prefix.mask.long(), position_ids=positions, **generate_kwargs
        )


class PlannerExecutorModel(MethodModel):
    """A model with its tokenizer: loaded from the folder that a trainer wrote, ready to plan and write.

    Attributes:
        model: the causal LM, a `PeftModel` where an adapter was loaded.
        tokenizer: padding on the left.
    """

    method = METHOD

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, tokenizer)
        if isinstance(model, PeftModel):
            check_adapter(model, METHOD)

    def plan(self, texts: str | list[str], **kwargs: Any) -> torch.Tensor:
        """Plans (B, n, Q) long of texts; keywords as for `unsloth_ext.plan`. Greedy without any."""
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
        """Texts from plans (B, n, Q); keywords as for `generate`.

        Returns:
            A text for each plan; with `num_return_sequences` > 1 a list of texts for each; with `return_dict_in_generate`
            what `execute_plan` returns.
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
        """Greedy plans, then texts from these alone; keywords as for `generate`.

        Returns:
            For a text its answer, for texts a list of answers, as `execute` returns them.
        """
        if isinstance(texts, str):
            found = self.generate([texts], **generate_kwargs)
            return found[0] if isinstance(found, list) else found
        return self.execute(self.plan(texts), **generate_kwargs) if texts else []
