"""The layout of texts in a batch, padded on either side or packed into rows, and conversion to one text in each row."""

import torch


class Texts:
    """The places of each text's tokens.

    Args:
        valid (B, T): bool, real tokens.
        documents (B, T): long, the text of each token in packed rows. None without packing.

    Attributes:
        valid (B, T): bool, real tokens.
        used (R, N): bool, which of N places each of R texts uses; they come first. Without packing R is B.
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
        """Convert values of tokens (B, T) to one text in each row (R, N), with 0 in unused places."""
        out = x.new_zeros(self.used.shape)
        out[self.row[self.valid], self.column[self.valid]] = x[self.valid]
        return out

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Reverse `rows`. Values of tokens that are not real are arbitrary."""
        return x[self.row, self.column]
