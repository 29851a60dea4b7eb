"""The last response to each prompt with its log-probabilities, to measure how far the policy has moved since."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Response:
    """The last response to a prompt: 1-D tensors on the CPU.

    Attributes:
        prompt: token ids, long.
        completion: token ids, long.
        log_probs: of the completion, float32; NaN at tokens that the policy did not write.
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    log_probs: torch.Tensor


def batch_of(responses: list[Response], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad prompts on the left and completions on the right.

    Returns:
        input_ids (B, P + C), attention_mask (B, P + C), log_probs (B, C) and the mask of completions (B, C).
    """
    left = pad_sequence([r.prompt.flip(0) for r in responses], True, pad).flip(1)
    here = pad_sequence([torch.ones_like(r.prompt).flip(0) for r in responses], True).flip(1)
    right = pad_sequence([r.completion for r in responses], True, pad)
    mask = pad_sequence([torch.ones_like(r.completion) for r in responses], True)
    log_probs = pad_sequence([r.log_probs for r in responses], True)
    return torch.cat([left, right], dim=1), torch.cat([here, mask], dim=1), log_probs, mask


def pack(memory: dict[int, Response]) -> dict[str, torch.Tensor]:
    """The memory as tensors for a checkpoint."""
    kept = list(memory.values())
    none = torch.empty(0, dtype=torch.long)
    return {
        "rows": torch.tensor(list(memory), dtype=torch.long),
        "prompt_lengths": torch.tensor([len(r.prompt) for r in kept], dtype=torch.long),
        "completion_lengths": torch.tensor([len(r.completion) for r in kept], dtype=torch.long),
        "prompts": torch.cat([r.prompt for r in kept]) if kept else none,
        "completions": torch.cat([r.completion for r in kept]) if kept else none,
        "log_probs": torch.cat([r.log_probs for r in kept]) if kept else none.float(),
    }


def unpack(tensors: dict[str, torch.Tensor]) -> dict[int, Response]:
    """The memory from the tensors of `pack`."""
    lengths = tensors["completion_lengths"].tolist()
    prompts = tensors["prompts"].split(tensors["prompt_lengths"].tolist())
    parts = zip(prompts, tensors["completions"].split(lengths), tensors["log_probs"].split(lengths), strict=True)
    return {row: Response(*part) for row, part in zip(tensors["rows"].tolist(), parts, strict=True)}
