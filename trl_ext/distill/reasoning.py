"""Distillation of written reasoning: SFT in which the tags around reasoning and answer have a larger weight."""

import copy
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoProcessor

from ..common.metric_sums import ExactMeans
from ..common.model_loading import name_of, preparing_models
from .config import ReasoningDistillConfig
from .per_token import PerTokenTrainer
from .tags import add_tags, check_tags_are_trained, give_embeddings


class ReasoningDistillTrainer(ExactMeans, PerTokenTrainer):
    """SFT on a teacher's written reasoning with a larger weight on tags (MiniMind).

    loss = sum_t w_t NLL_t / N, with w_t = `tag_weight` where the target is a tag and 1 at other trained tokens

    N is the number of trained tokens of a whole step, in all micro-batches and processes, regardless of weights. So the
    gradient of a tag is `tag_weight` times SFT's, that of another token is SFT's, and `tag_weight=1` is SFT, bit for
    bit.

    Each tag is one token. New tags are added to the tokenizer, in place, before rows are tokenized, and to the model's
    embeddings before PEFT wraps it. Under LoRA the new embeddings are trained too (`trainable_token_indices`), also in
    an untied head. `AutoPeftModelForCausalLM` loads such an adapter.

    Logs `loss/tags` and `loss/text`: the mean NLL of tags and of other trained tokens since the last log.

    Args:
        model: the student, or its name.
        args: the configuration; None: the defaults.
        data_collator: as in `SFTTrainer`.
        train_dataset: as in `SFTTrainer`.
        eval_dataset: as in `SFTTrainer`.
        processing_class: the tokenizer, which is changed in place; None: the model's.
        *others: further arguments of `SFTTrainer`.
        **keywords: further arguments of `SFTTrainer`.

    Raises:
        ValueError: in the constructor, for a PEFT method or a wrapped model that would leave new tokens untrained, or a
            training dataset without any tag; see also `PerTokenTrainer`.
    """

    _tag_names = ["trl", "reasoning-distillation"]
    _name = "Reasoning distillation"
    _config_class = ReasoningDistillConfig

    def __init__(
        self,
        model: Any,
        args: ReasoningDistillConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *others: Any,
        **keywords: Any,
    ):
        args = self._checked(model, args)
        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
            processing_class = AutoProcessor.from_pretrained(
                name_of(model), revision=revision, trust_remote_code=args.trust_remote_code
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        ids, added = add_tags(tokenizer, args.tags)
        peft_config = keywords["peft_config"] = copy.deepcopy(keywords.get("peft_config"))

        def prepare(model: Any) -> None:
            give_embeddings(model, tokenizer, ids, added, peft_config, args.seed)

        if not isinstance(model, str):
            prepare(model)
        with preparing_models(self._stock_init, prepare):
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, *others, **keywords
            )
        if isinstance(self.train_dataset, Dataset) and "labels" in self.train_dataset.column_names:
            check_tags_are_trained(self.train_dataset, ids, args.tags)
        self._tag_ids = torch.tensor(ids)
        head = self.model.get_output_embeddings()
        if not hasattr(head, "bias"):  # PEFT's wrapper for trained rows lacks it; TRL's fused head reads it
            vars(head)["bias"] = head.original_module.bias

    def _score(self, model, num_items_in_batch, **inputs):
        outputs = model(**inputs, fused_lm_head=True)
        log_probs, trained = outputs.log_probs, outputs.label_mask
        targets = inputs["labels"][:, 1:].to(trained.device)
        is_tag = torch.isin(targets, self._tag_ids.to(targets.device))
        self._log_terms(log_probs.detach(), tags=is_tag, text=trained & ~is_tag)
        outputs.log_probs = torch.where(is_tag, self.args.tag_weight * log_probs, log_probs)
        return outputs

    def _log_terms(self, log_probs: torch.Tensor, **where: torch.Tensor) -> None:
        for name, mask in where.items():
            self._add_to_mean(f"loss/{name}", -(log_probs * mask).sum(), mask.sum())
