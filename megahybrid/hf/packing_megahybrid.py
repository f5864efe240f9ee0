"""Rows that hold several documents, as collators pack them for training."""

import torch


class Documents:
    """The documents of rows `[B, T]` as sequences of their own, padded on the left, and back.

    Attributes:
        positions: int64 `[documents, longest]`, each token's place in its document, -1 for padding.
        lengths: int64 `[documents]`, their tokens.
        places: int64 `[tokens]`, where those stand in the flattened rows.
    """

    def __init__(self, document, places):
        """int64 `[tokens]` each: a document's number, ascending, and where in the flattened rows the token stands."""
        _, index, lengths = document.unique_consecutive(return_inverse=True, return_counts=True)
        self.shape, self.places, self.lengths = (len(lengths), int(lengths.max())), places, lengths
        offsets = torch.arange(len(places), device=places.device) - (lengths.cumsum(0) - lengths)[index]
        self.cells = (index + 1) * self.shape[1] - lengths[index] + offsets
        positions = torch.full((self.shape[0] * self.shape[1],), -1, device=places.device)
        self.positions = positions.index_copy(0, self.cells, offsets).view(self.shape)

    @classmethod
    def of(cls, begins, real):
        """bool `[B, T]` each: where a document begins, beside each row's start, and what is no padding. None where no
        row holds two."""
        row = torch.zeros_like(begins)
        row[:, :1] = True
        places = real.flatten().nonzero()[:, 0]
        documents, rows = (x.flatten().cumsum(0)[places] for x in (begins | row, row))
        alone = len(documents.unique_consecutive()) == len(rows.unique_consecutive())
        return None if alone else cls(documents, places)

    def unpacked(self, x):
        """`[B, T, C]` → `[documents, longest, C]`, 0 for padding."""
        return self._moved(x, self.places, self.cells, self.shape)

    def packed(self, x, rows):
        """`[documents, longest, C]` → `[B, T, C]`, as `rows` has them, 0 for what is padding there."""
        return self._moved(x, self.cells, self.places, rows.shape[:2])

    @staticmethod
    def _moved(x, source, target, shape):
        moved = x.new_zeros(shape[0] * shape[1], x.shape[-1]).index_copy(0, target, x.flatten(0, 1)[source])
        return moved.unflatten(0, shape)


def beginnings(shape, position_ids, cu_seq_lens, seq_idx):
    """bool `[B, T]`, a rows' shape: where documents begin by what a collator gives; None where it gives nothing.

    position_ids int64 `[B or 1, T]` do not go on by one there; seq_idx `[B or 1, T]` changes; cu_seq_lens int32
    `[documents + 1]` counts them through the flattened rows.
    """
    if cu_seq_lens is not None:
        begins = torch.zeros(shape, dtype=torch.bool, device=cu_seq_lens.device)
        begins.view(-1)[cu_seq_lens[cu_seq_lens < begins.numel()].long()] = True
        return begins
    given, step = (seq_idx, 0) if seq_idx is not None else (position_ids, 1)
    if given is None:
        return None
    begins = torch.ones_like(given, dtype=torch.bool)
    begins[:, 1:] = given.diff(dim=1) != step
    return begins.expand(shape)
