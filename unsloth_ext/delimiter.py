"""Incremental search for the answer delimiter, on token ids, without decoding anything.

A Knuth-Morris-Pratt automaton over characters, compiled to one row per state and one column per token of the
vocabulary: feeding a batch of tokens is one gather, on the device, and finds delimiters that are split over tokens or lie
inside one.
"""

import torch
from transformers import PreTrainedTokenizerBase


class DelimiterMatcher:
    """Finds `delimiter` in streams of token ids.

    Attributes:
        table: (len(delimiter) + 1, V) int16 on the CPU, `table[state, token]` is the next state. The last state,
            `done`, is absorbing. Special tokens change nothing: text is decoded without them.
        done: the state in which the delimiter is complete.

    Raises:
        ValueError: the delimiter is empty, or the tokenizer cannot produce it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str, vocab_size: int | None = None):
        if not delimiter:
            raise ValueError("the answer delimiter is empty")
        self.delimiter, self.done = delimiter, len(delimiter)
        self.table = _compile(_token_texts(tokenizer), delimiter, vocab_size or 0)
        self._tables: dict[torch.device, torch.Tensor] = {}
        ids = tokenizer.encode(delimiter, add_special_tokens=False)
        if not self.complete(torch.tensor([ids], dtype=torch.long)).any():
            raise ValueError(
                f"the tokenizer cannot produce the delimiter {delimiter!r}: it encodes to {ids}, which decodes to "
                f"{tokenizer.decode(ids)!r}. Choose a delimiter from its vocabulary"
            )

    def step(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Next states (B,) long after `tokens` (B,) long; no host synchronisation."""
        if tokens.device not in self._tables:
            self._tables[tokens.device] = self.table.to(tokens.device)
        return self._tables[tokens.device][state, tokens].long()

    def complete(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) bool: whether the delimiter is complete once the token at t is there; for ids (B, T) long."""
        state = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        out = torch.empty_like(ids, dtype=torch.bool)
        for t in range(ids.shape[1]):
            state = self.step(state, ids[:, t])
            out[:, t] = state == self.done
        return out


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds when it follows another one."""
    special = set(tokenizer.all_special_ids)
    ids = range(len(tokenizer))
    anchor = next(i for i in ids if i not in special and tokenizer.decode([i]).strip())
    # Behind an anchor: some decoders strip the space of a first token
    head = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    pairs = tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    return ["" if i in special else text[len(head) :] for i, text in zip(ids, pairs, strict=True)]


def _compile(texts: list[str], delimiter: str, vocab_size: int) -> torch.Tensor:
    n = len(delimiter)
    failure = [0] * n
    for i in range(1, n):
        k = failure[i - 1]
        while k and delimiter[i] != delimiter[k]:
            k = failure[k - 1]
        failure[i] = k + (delimiter[i] == delimiter[k])

    def run(state: int, text: str) -> int:
        for char in text:
            if state == n:
                return n
            while state and char != delimiter[state]:
                state = failure[state - 1]
            state += char == delimiter[state]
        return state

    # Most tokens hold no character of the delimiter and reset every state
    table = torch.arange(n + 1, dtype=torch.int16)[:, None].repeat(1, max(len(texts), vocab_size))
    table[:n, : len(texts)] = 0
    letters = set(delimiter)
    for token, text in enumerate(texts):
        if not text:
            table[:, token] = torch.arange(n + 1)
        elif not letters.isdisjoint(text):
            table[:, token] = torch.tensor([run(state, text) for state in range(n + 1)])
    return table
