"""HRPO's published decoding implemented literally, to compare the speed of ours with.

Each step decodes every row's whole completion to text to search for the delimiter, and computes the soft embedding as a
dense (B, V) x (V, d) product. The loop, sampling, cache and gate are transformers' and ours, so only these two choices
differ.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth_ext import DelimiterMatcher
from unsloth_ext.hrpo.decoding import HybridSession


class LiteralSession(HybridSession):
    """A `HybridSession` for sampled soft embeddings, without incremental search and sparse mixture."""

    def __init__(self, model: PreTrainedModel, matcher: DelimiterMatcher, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, matcher)
        self.tokenizer = tokenizer
        self._tokens: list[torch.Tensor] = []

    def see_token(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        self._tokens.append(tokens)
        texts = self.tokenizer.batch_decode(torch.stack(self._tokens, dim=1))
        thinking = [self.matcher.delimiter not in text for text in texts]
        self._masks.append(torch.tensor(thinking, device=tokens.device))
        self._pending = (self._scores.softmax(-1), None)  # None: use all rows of the embedding
