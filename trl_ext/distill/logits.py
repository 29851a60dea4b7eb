"""Distillation of logits: a student follows the next-token distributions of a teacher with the same vocabulary."""

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import FusedCausalLMOutput

from unsloth_ext.common.logits import logits_at

from ..common.teacher import check_vocabularies, for_teacher, load_teacher, shard_teacher
from .config import LogitsDistillConfig
from .per_token import PerTokenTrainer


TOKENS_PER_CHUNK = 2048
NOT_FOR_THE_TEACHER = ("labels", "output_router_logits")


class LogitsDistillTrainer(PerTokenTrainer):
    """SFT that adds the KL to a teacher's next-token distributions (Hinton et al., arXiv 1503.02531).

    loss = sum_t [alpha CE_t + (1 - alpha) T^2 KL(softmax(teacher_t / T) || softmax(student_t / T))] / (trained tokens)

    The sum is over the trained tokens of a whole step, those with a label, in all micro-batches and processes. Both
    distributions are over the vocabulary rows that the two models share: rows beyond the tokenizer's are padding, and
    their number may differ. If the student is a mixture of experts, SFT's auxiliary loss is added in full. Logits are
    computed at trained tokens only, (N, V) for each model.

    Args:
        model: the student, or its name.
        args: the configuration; None: the defaults.
        *others: further arguments of `SFTTrainer`.
        teacher_model: a model, or its hub id or folder; None: `args.teacher_model_name_or_path`.
        teacher_processing_class: the teacher's tokenizer; None: the one in its folder, if there is one.
        **keywords: further arguments of `SFTTrainer`.

    Attributes:
        teacher: frozen, in its own dtype and, with a device map, on its own devices; None if `alpha=1`.

    Raises:
        ValueError: in the constructor, for a missing teacher or one with another vocabulary, a model with fewer
            embeddings than its tokenizer has tokens, or a PEFT method that adds virtual tokens; see also
            `PerTokenTrainer`.
    """

    _tag_names = ["trl", "logits-distillation"]
    _name = "Logits distillation"
    _config_class = LogitsDistillConfig

    def __init__(
        self,
        model: Any,
        args: LogitsDistillConfig | None = None,
        *others: Any,
        teacher_model: PreTrainedModel | str | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **keywords: Any,
    ):
        args = self._checked(model, args)
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if args.alpha < 1 and teacher_model is None:
            raise ValueError("teacher_model: pass a teacher, set teacher_model_name_or_path, or set alpha=1")
        peft_config = keywords.get("peft_config")
        if args.alpha < 1 and peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(f"{type(peft_config).__name__} adds virtual tokens, which the teacher lacks; use LoRA")
        super().__init__(model, args, *others, **keywords)
        self.teacher = None
        if self._is_sft:
            return
        self.teacher = load_teacher(
            teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code, self.accelerator.device
        )
        check_vocabularies(self._tokenizer, self.teacher, teacher_processing_class)
        self._check_positions(self.teacher)
        self.teacher = shard_teacher(self.teacher, self.accelerator)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if rows < len(self._tokenizer):
            raise ValueError(
                f"the model has {rows} embeddings, but its tokenizer has {len(self._tokenizer)} tokens: call "
                "model.resize_token_embeddings(len(tokenizer)) first"
            )

    @property
    def _is_sft(self) -> bool:
        return self.args.alpha == 1

    def _score(self, model, num_items_in_batch, **inputs):
        args = self.args
        labels = inputs.pop("labels")
        keep = F.pad(labels[:, 1:] != -100, (0, 1))
        outputs = logits_at(model, keep, **inputs)
        student = outputs.logits
        teacher = self._teacher_logits(keep, inputs).to(student.device)
        targets = labels[:, 1:][keep[:, :-1]].to(student.device)
        parts = zip(*(x.split(TOKENS_PER_CHUNK) for x in (student, teacher, targets)), strict=True)
        # Recomputed in the backward, so that only one chunk's fp32 distributions are in memory at a time
        terms = [checkpoint(token_terms, *part, args.temperature, use_reentrant=False) for part in parts]
        ce, kl, entropy, is_top1 = (torch.cat(term) for term in zip(*terms, strict=True))
        self._log_terms(num_items_in_batch, ce=ce, kl=kl)
        loss = args.alpha * ce + (1 - args.alpha) * args.temperature**2 * kl
        return FusedCausalLMOutput(
            log_probs=-loss,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=keep[:, :-1],
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    @torch.no_grad()
    def _teacher_logits(self, keep: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        inputs = {k: x for k, x in inputs.items() if k not in NOT_FOR_THE_TEACHER}
        return logits_at(self.teacher, keep, **for_teacher(self.teacher, inputs, keep.device)).logits

    def _log_terms(self, num_items_in_batch: torch.Tensor | None, **terms: torch.Tensor) -> None:
        """Log the mean of each term per trained token. In training it is scaled like SFT's loss, to be the mean of the
        step."""
        training = self.model.training and num_items_in_batch is not None
        for name, term in terms.items():
            mean = term.detach().sum() / max(1, len(term))
            if training:
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                mean = term.detach().sum() * self.current_gradient_accumulation_steps * processes / num_items_in_batch
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][f"loss/{name}"].append(self.accelerator.gather(mean).mean().item())


def token_terms(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, KL(softmax(teacher / T) || softmax(student / T)), entropy, and top-1 hit of each token.

    Args:
        student (N, V), teacher (N, V'): float logits. The KL is over the first min(V, V') entries of both.
        targets (N,): long; the next tokens.
        temperature: T.

    Returns:
        Four tensors (N,): cross-entropy, KL and entropy in nats, in float32 or wider, and bool: whether the target was
        the likeliest token. Entropy and top-1 are the student's at temperature 1 and have no gradient.
    """
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    log_probs = student.log_softmax(-1)
    ce = F.nll_loss(log_probs, targets, reduction="none")
    shared = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = ((x[:, :shared] / temperature).log_softmax(-1) for x in (student, teacher))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        is_top1 = log_probs.argmax(-1) == targets
    return ce, kl, entropy, is_top1
