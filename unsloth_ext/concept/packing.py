"""Texts in the rows of a batch, padded on either side or packed one behind the other, and the same texts a row each."""

import torch


class Texts:
    """Where each text's tokens stand.

    Attributes:
        valid (B, T) bool: real tokens.
        used (R, N) bool: which of N tokens each of R texts has; they come first. Without packing R is B.
    """

    def __init__(self, valid: torch.Tensor, documents: torch.Tensor | None = None):
        self.valid = valid
        self.column = (valid.cumsum(1) - 1).clamp(min=0)
        self.row = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)
        number = len(valid)
        if documents is not None:
            documents = documents.masked_fill(~valid, -1)
            before = torch.nn.functional.pad(documents, (1, 0), value=-2)[:, :-1]
            starts = valid & (documents != before)
            self.row = (starts.flatten().cumsum(0) - 1).view_as(valid).clamp(min=0)
            number = int(starts.sum())
            first = torch.where(starts, self.column, 0).cummax(1).values
            self.column = self.column - first
        width = int(self.column.max()) + 1
        self.used = torch.zeros(number, width, dtype=torch.bool, device=valid.device)
        self.used[self.row[valid], self.column[valid]] = True

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """What each token has (B, T), a text a row (R, N); 0 elsewhere."""
        out = x.new_zeros(self.used.shape)
        out[self.row[self.valid], self.column[self.valid]] = x[self.valid]
        return out

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `rows`; anything where a token is not real."""
        return x[self.row, self.column]
