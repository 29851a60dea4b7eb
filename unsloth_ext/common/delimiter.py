"""Incremental search for the answer delimiter in token ids, without decoding.

A Knuth-Morris-Pratt automaton over the bytes of UTF-8 is compiled to a table with a row for each state and a column for
each token of the vocabulary. Feeding a batch of tokens is one gather on the device. It finds delimiters that are split
over several tokens, even within a character, and those that lie inside one token.
"""

import hashlib
import re

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece writes a token for one byte


class DelimiterMatcher:
    """Finds a delimiter in streams of token ids.

    Args:
        tokenizer: the tokenizer of the model.
        delimiter: the text to find.
        vocab_size: the vocabulary size of the model, if known. The table is made as wide.

    Attributes:
        table (S, V + 1): int16 on the CPU. `table[state, token]` is the next state. The number of states S is that of
            the delimiter's bytes plus 1. The last state, `done`, is absorbing. Special tokens leave the state
            unchanged, since text is decoded without them. So do ids above the tokenizer's, which a model with padded
            embeddings can sample: the last column stands for all of them.
        done: the state in which the delimiter is complete.

    Raises:
        ValueError: the delimiter is empty, or the tokenizer cannot produce it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str, vocab_size: int | None = None):
        if not isinstance(delimiter, str) or not delimiter:
            raise ValueError(f"delimiter={delimiter!r}: give the text that ends the thinking, such as '####'")
        wanted = delimiter.encode()
        self.delimiter, self.done = delimiter, len(wanted)
        self.table = _compile(_token_bytes(tokenizer), wanted, vocab_size or 0)
        self._tables: dict[torch.device, torch.Tensor] = {}
        ids = tokenizer.encode(delimiter, add_special_tokens=False)
        if not self.complete(torch.tensor([ids], dtype=torch.long)).any():
            special = [tokenizer.decode([i]) for i in ids if i in set(tokenizer.all_special_ids)]
            raise ValueError(
                f"the tokenizer cannot produce the delimiter {delimiter!r}: "
                + (
                    f"it contains the special tokens {', '.join(special)}, and answers are decoded without these. "
                    if special
                    else f"it encodes to {ids}, which reads {tokenizer.decode(ids)!r} after other text. "
                )
                + "Choose a delimiter of ordinary tokens"
            )

    @property
    def digest(self) -> str:
        """A hash of the table. It is the same for tokenizers with which the same tokens complete the delimiter."""
        return hashlib.sha256(self.table.numpy().tobytes()).hexdigest()

    def step(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Advance the state of each row by one token, without host synchronisation.

        Args:
            state (B,): long, 0 at the start of a text.
            tokens (B,): long.

        Returns:
            The next states (B,) long.
        """
        if tokens.device not in self._tables:
            self._tables[tokens.device] = self.table.to(tokens.device)
        return advance(self._tables[tokens.device], state, tokens)

    def complete(self, ids: torch.Tensor) -> torch.Tensor:
        """Return (B, T) bool for ids (B, T) long: whether the delimiter is complete after token t."""
        state = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        out = torch.empty_like(ids, dtype=torch.bool)
        for t in range(ids.shape[1]):
            state = self.step(state, ids[:, t])
            out[:, t] = state == self.done
        return out


def advance(table: torch.Tensor, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Advance states by one token each, without host synchronisation.

    Args:
        table (S, V + 1): int16, of a `DelimiterMatcher`, on the device of the states.
        state (B,): long.
        tokens (B,): long.

    Returns:
        The next states (B,) long.
    """
    return table[state, tokens.clamp(max=table.shape[1] - 1)].long()


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes that each token adds to a text when it follows another token."""
    special = set(tokenizer.all_special_ids)
    ids = range(max(tokenizer.get_vocab().values()) + 1)  # the ids may have gaps
    anchor = next((i for i in ids if i not in special and tokenizer.decode([i]).strip()), None)
    if anchor is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no token that holds text")
    # After an anchor token, because some decoders strip the space of a first token
    head = tokenizer.decode([anchor], clean_up_tokenization_spaces=False)
    pairs = tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    texts = ["" if i in special else text[len(head) :] for i, text in zip(ids, pairs, strict=True)]
    return [_part(tokenizer, i) if "\ufffd" in text else text.encode() for i, text in enumerate(texts)]


def _part(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return the bytes of a token that is not a whole number of characters and decodes to the replacement character."""
    name = tokenizer.convert_ids_to_tokens(token)
    byte = BYTE.fullmatch(name)
    if byte:
        return bytes([int(byte[1], 16)])
    byte_level = {char: number for number, char in bytes_to_unicode().items()}
    if all(char in byte_level for char in name):
        return bytes(byte_level[char] for char in name)
    return name.encode()


def _compile(texts: list[bytes], delimiter: bytes, vocab_size: int) -> torch.Tensor:
    n = len(delimiter)
    failure = [0] * n
    for i in range(1, n):
        k = failure[i - 1]
        while k and delimiter[i] != delimiter[k]:
            k = failure[k - 1]
        failure[i] = k + (delimiter[i] == delimiter[k])

    def run(state: int, text: bytes) -> int:
        for byte in text:
            if state == n:
                return n
            while state and byte != delimiter[state]:
                state = failure[state - 1]
            state += byte == delimiter[state]
        return state

    # Most tokens hold no byte of the delimiter and reset every state
    table = torch.arange(n + 1, dtype=torch.int16)[:, None].repeat(1, max(len(texts), vocab_size) + 1)
    table[:n, : len(texts)] = 0
    letters = set(delimiter)
    for token, text in enumerate(texts):
        if not text:
            table[:, token] = torch.arange(n + 1)
        elif not letters.isdisjoint(text):
            table[:, token] = torch.tensor([run(state, text) for state in range(n + 1)])
    return table
