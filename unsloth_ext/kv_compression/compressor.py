"""`RKVCompressor`: KaVa's compression from attention weights."""

import torch

from .compression import CompressedKV, take
from .scores import kava_redundancy


class RKVCompressor:
    """Keeps the keys that an answer attends to and that differ from each other (KaVa, arXiv 2510.02312, sec. 3.2).

    The score is `lambda I + (1 - lambda) R`, and the M keys with the largest scores stay. `compress_kv` does the same
    from queries and keys, without attention weights.

    If several query heads share a key-value head, KaVa takes the largest *logit* of the group, which weights no longer
    contain. Here the group's weights are averaged. With as many key-value heads as query heads both agree.

    Args:
        num_latent_tokens: M.
        lambda_mix: the weight of the importance I against the redundancy score R.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, num_latent_tokens: int = 24, lambda_mix: float = 0.1):
        if num_latent_tokens < 1:
            raise ValueError(f"num_latent_tokens={num_latent_tokens}: must be at least 1")
        if not 0 <= lambda_mix <= 1:
            raise ValueError(f"lambda_mix={lambda_mix}: must be between 0 and 1")
        self.num_latent_tokens, self.lambda_mix = num_latent_tokens, lambda_mix

    def compute_importance_score(
        self,
        attention_weights: torch.Tensor,
        step_mask: torch.Tensor,
        answer_mask: torch.Tensor | None = None,
        num_key_value_heads: int | None = None,
    ) -> torch.Tensor:
        """Average the attention of the answer's queries to the steps. Other keys get 0.

        Args:
            attention_weights (B, Hq, A, T): floating point, of the answer's A tokens to T keys. Their sum over the
                steps is scaled to 1.
            step_mask (B, T): bool, which keys are steps.
            answer_mask (B, A): bool, which queries are real. None means all.
            num_key_value_heads: Hkv. None means Hq.

        Returns:
            (B, Hkv, T) fp32.
        """
        weights = attention_weights.float() * step_mask[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        weights = weights.unflatten(1, (num_key_value_heads or weights.shape[1], -1)).mean(2)
        if answer_mask is None:
            return weights.mean(2)
        real = answer_mask[:, None, :, None].float()
        return (weights * real).sum(2) / real.sum(2).clamp(min=1)

    def compute_redundancy_score(self, key_states: torch.Tensor, step_mask: torch.Tensor) -> torch.Tensor:
        """Return the softmax over the steps of minus the mean cosine similarity to the other steps. Other keys get 0.

        Args:
            key_states (B, Hkv, T, D): floating point.
            step_mask (B, T): bool, which keys are steps.

        Returns:
            (B, Hkv, T) fp32.
        """
        return kava_redundancy(key_states, step_mask.bool())

    def compress(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        attention_weights: torch.Tensor,
        step_mask: torch.Tensor,
        answer_mask: torch.Tensor | None = None,
    ) -> CompressedKV:
        """Keep the M best keys of each sample and head with their values, in chronological order.

        A sample with fewer than M steps keeps all of them, and `valid` marks their slots.

        Args:
            key_states, value_states (B, Hkv, T, D): floating point.
            attention_weights (B, Hq, A, T): floating point, see `compute_importance_score`.
            step_mask (B, T): bool, which keys are steps.
            answer_mask (B, A): bool, which queries are real. None means all.

        Returns:
            The kept keys and values.
        """
        importance = self.compute_importance_score(attention_weights, step_mask, answer_mask, key_states.shape[1])
        redundancy = self.compute_redundancy_score(key_states, step_mask)
        score = self.lambda_mix * importance + (1 - self.lambda_mix) * redundancy
        return take(key_states, value_states, score, self.num_latent_tokens, step_mask.bool())
