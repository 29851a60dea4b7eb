"""A cache for `generate()` that keeps the best keys of a text: R-KV while decoding (arXiv 2505.24133).

Each row of each layer grows to `budget + buffer` keys, is cut to the `budget` best for each KV head, and grows again.
Keys keep their rotary positions, and new tokens get their true positions.
"""

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..common.attention_tap import NAME, check_look, expect_attention
from ..common.layer_kinds import check_layers
from ..common.wrapping import backbone_of
from .compression import KVScoring, score_keys, take


class CompressedLayer(DynamicLayer):
    """Keys and values of one layer, and the queries that score them.

    Attributes:
        seen: the number of tokens so far, dropped ones included.
        valid (B, S): bool, which of the S kept columns are real.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, budget: int, buffer: int, scoring: KVScoring):
        super().__init__()
        self.budget, self.buffer, self.scoring = budget, buffer, scoring
        self.seen = 0
        self.valid: torch.Tensor | None = None
        self._most = 0  # upper bound on the real keys of a row, known without asking the device
        self._queries: torch.Tensor | None = None
        self._asked: torch.Tensor | None = None  # which of the queries are of real tokens
        self._awaited = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self._awaited:  # attention skipped `observe`, so nothing would ever be dropped
            raise ValueError(
                "attention did not read the keys that the compressed cache holds, but others made from them: take a model "
                "such as llama or qwen3"
            )
        self._awaited = True
        out = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        expect_attention(self)
        return out

    def get_seq_length(self) -> int:
        return self.seen

    def mask(self, length: int, given: torch.Tensor | None) -> torch.Tensor | None:
        """Return the attention mask of new tokens over the kept columns.

        Args:
            length: the number of new tokens.
            given: (B, 1, length, seen) or (1, 1, length, seen) bool, transformers' mask over all columns so far. None
                is causal.

        Returns:
            (B, 1, length, S) bool, or None for a causal mask.
        """
        rows, columns = self.keys.shape[0], self.keys.shape[-2]
        # The last row of transformers' mask sees every real token, so it says which new tokens are real
        real = self.keys.new_ones(rows, length, dtype=torch.bool)
        if given is not None:
            real = given[:, 0, -1, -length:].expand(rows, -1)
        self.valid = real if self.valid is None else torch.cat([self.valid, real], dim=1)
        if self.seen == columns:  # nothing was dropped yet: the mask fits
            return given
        causal = self.valid.new_ones(length, columns).tril(columns - length)
        return self.valid[:, None, None] & causal

    def observe(self, queries: torch.Tensor) -> None:
        """Store the latest queries (B, Hq, T, D) and compress the rows whose buffer is full."""
        self._awaited = False
        length, window = queries.shape[2], self.scoring.window
        asked = self.valid[:, -length:]
        if self._queries is None:
            self._queries, self._asked = queries, asked
        else:
            self._queries = torch.cat([self._queries, queries], dim=2)
            self._asked = torch.cat([self._asked, asked], dim=1)
        self._queries, self._asked = self._queries[:, :, -window:], self._asked[:, -window:]
        self._most += length
        if self._most < self.budget + self.buffer:
            return
        counts = self.valid.sum(-1).tolist()
        self._most = max(counts)
        full = [count >= self.budget + self.buffer for count in counts]
        if not any(full):
            return
        scores = score_keys(self.keys, self._queries, self.budget, self.scoring, self.valid, self._asked)
        best = take(self.keys, self.values, scores, self.budget, self.valid).indices
        # Rows whose buffer is not full keep all keys, as they would in a batch of their own
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.clamp(min=0), best >= 0)
        keep = torch.where(torch.tensor(full, device=keep.device)[:, None, None], keep, self.valid[:, None])
        self._most = max(self.budget if over else count for over, count in zip(full, counts, strict=True))
        kept = take(self.keys, self.values, torch.zeros_like(scores), self._most, keep)
        self.keys, self.values, self.valid = kept.keys, kept.values, kept.valid

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.valid, self._queries, self._asked = (x[indices] for x in (self.valid, self._queries, self._asked))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.valid, self._queries, self._asked = (
            x.repeat_interleave(repeats, dim=0) for x in (self.valid, self._queries, self._asked)
        )

    def crop(self, *_) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped: what was dropped is gone")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("a compressed cache does not support beams: sample or decode greedily")


class CompressedCache(Cache):
    """A cache that holds at most `budget + buffer` tokens: `model.generate(...,
    past_key_values=CompressedCache(model))`, or `cache=` since transformers 5.24.

    Make a new cache for each call. The model's attention becomes SDPA with an observer, which is plain SDPA for other
    caches.

    Args:
        model: a causal LM with SDPA attention, wrapped by PEFT or not.
        budget: the number of keys that a compression keeps, the window included.
        buffer: the number of keys that are added before the next compression.
        scoring: None means `KVScoring("rkv")`. Its window is the number of latest queries that score the keys.

    Raises:
        ValueError: `budget` or `buffer` is too small; or the model's attention is not SDPA over the whole text, is not
            seen by a tap (Falcon), or reads other keys than a cache holds (MLA).
    """

    def __init__(self, model: torch.nn.Module, budget: int = 128, buffer: int = 128, scoring: KVScoring | None = None):
        scoring = scoring or KVScoring("rkv")
        if budget <= scoring.window:
            raise ValueError(f"budget={budget}: must be more than the window of {scoring.window}, which is always kept")
        if buffer < 1:
            raise ValueError(f"buffer={buffer}: must be at least 1")
        check_layers(model, "a compressed cache")
        check_look(model, "a compressed cache")
        config = backbone_of(model).config
        config._attn_implementation = NAME
        count = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[CompressedLayer(budget, buffer, scoring) for _ in range(count)])

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the keys and values that the cache holds now."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.keys, layer.values))
