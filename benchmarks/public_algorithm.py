"""The peer of the decode benchmark: HRPO's published decoding taken literally, from its description.

Each step decodes every row's whole completion to text to look for the delimiter, and forms the soft embedding as a dense
(B, V) x (V, d) product. The loop, the sampling, the cache and the gate are transformers' and ours, so these two choices are
all that is compared.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsloth_ext import DelimiterMatcher
from unsloth_ext.hrpo.decoding import HybridSession


class LiteralSession(HybridSession):
    """A `HybridSession` for soft embeddings, sampled, without the incremental search and the sparse mixture."""

    def __init__(self, model: PreTrainedModel, matcher: DelimiterMatcher, tokenizer: PreTrainedTokenizerBase):
        super().__init__(model, matcher)
        self.tokenizer = tokenizer
        self._tokens: list[torch.Tensor] = []

    def see_token(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        self._tokens.append(tokens)
        texts = self.tokenizer.batch_decode(torch.stack(self._tokens, dim=1))
        thinking = [self.matcher.delimiter not in text for text in texts]
        self._masks.append(torch.tensor(thinking, device=tokens.device))
        self._pending = (self._scores.softmax(-1), None)  # None: all rows of the embedding are read
