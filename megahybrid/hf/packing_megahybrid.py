"""Rows that hold several documents, as collators pack them for training."""

import torch

from megahybrid.hf.layers_megahybrid import real_tokens


class Documents:
    """The documents of rows `[B, T]` as sequences of their own, laid end to end or padded on the left, and back.

    Attributes:
        lengths: int64 `[documents]`, tokens of each.
        places: int64 `[tokens]`, where in the flattened rows each token stands.
        positions: int64 `[documents, longest]`, each token's place in its document, -1 for padding.
        several: whether some row holds more than one.
    """

    def __init__(self, x, attention_mask, begins=None):
        """Of rows x `[B, T, C]`; begins, bool `[B, T]`: where documents begin beside each row's start."""
        row = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        row[:, :1] = True
        real = torch.ones_like(row) if attention_mask is None else real_tokens(x, attention_mask)
        self.rows, self.places = row.shape, real.flatten().nonzero()[:, 0]
        if not len(self.places):
            raise ValueError("attention_mask is 0 everywhere: give a batch that has a token.")
        begins = row if begins is None else begins.to(x.device) | row
        document, row = (each.flatten().cumsum(0)[self.places] for each in (begins, row))
        _, index, self.lengths = document.unique_consecutive(return_inverse=True, return_counts=True)
        self.several = len(self.lengths) > len(row.unique_consecutive())
        offsets = torch.arange(len(index), device=index.device) - (self.lengths.cumsum(0) - self.lengths)[index]
        self._padded = (len(self.lengths), int(self.lengths.max()))
        self._cells = (index + 1) * self._padded[1] - self.lengths[index] + offsets
        positions = torch.full((self._padded[0] * self._padded[1],), -1, device=index.device)
        self.positions = positions.index_copy(0, self._cells, offsets).view(self._padded)

    def joined(self, x):
        """`[B, T, C]` → `[tokens, C]`."""
        return x.flatten(0, 1)[self.places]

    def in_rows(self, tokens):
        """`[tokens, C]` → `[B, T, C]`, 0 for padding."""
        return self._laid(tokens, self.places, self.rows)

    def padded(self, x):
        """`[B, T, C]` → `[documents, longest, C]`, 0 for padding."""
        return self._laid(self.joined(x), self._cells, self._padded)

    def unpadded(self, x):
        """`[documents, longest, C]` → `[B, T, C]`, 0 for padding."""
        return self.in_rows(x.flatten(0, 1)[self._cells])

    @staticmethod
    def _laid(tokens, places, shape):
        return tokens.new_zeros(shape[0] * shape[1], tokens.shape[1]).index_copy(0, places, tokens).unflatten(0, shape)


def several_documents(x, attention_mask, position_ids, cu_seq_lens, seq_idx, cache=None):
    """The documents of rows x `[B, T, C]` by what a collator gives, None where no row holds two: position_ids int64
    `[B or 1, T]` are 0 where a document begins, seq_idx `[B or 1, T]` changes, and cu_seq_lens int32
    `[documents + 1]` counts tokens through the flattened rows. Raises ValueError for other position_ids.
    """
    if position_ids is not None:
        document_starts = _starts(x, attention_mask, position_ids, cache)
    if cu_seq_lens is not None:
        begins = torch.zeros(x.shape[:2], dtype=torch.bool, device=cu_seq_lens.device)
        begins.view(-1)[cu_seq_lens[cu_seq_lens < begins.numel()].long()] = True
    elif seq_idx is not None:
        begins = torch.nn.functional.pad(seq_idx.diff(dim=1) != 0, (1, 0)).expand(x.shape[:2])
    elif position_ids is not None:
        begins = document_starts
    else:
        return None
    documents = Documents(x, attention_mask, begins)
    return documents if documents.several else None


def _starts(x, attention_mask, position_ids, cache):
    """bool `[B, T]`: which tokens have position 0. Raises ValueError where ids are not those that layers count."""
    ids = position_ids.to(x.device).expand(x.shape[:2])
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else real_tokens(x, attention_mask)
    past = torch.zeros_like(ids[:, :1]) if cache is None or cache.lengths is None else cache.lengths[:, None]
    # A row's first token has its place among the tokens, or among the columns where padding is counted, too.
    first = real & (real.long().cumsum(1) == 1)
    column = torch.arange(ids.shape[1], device=x.device) + (0 if cache is None else cache.seen)
    known = torch.where(first, (ids == past) | (ids == column), ids == 0)[real]
    if not bool((known | torch.nn.functional.pad(ids[real].diff() == 1, (1, 0)) & ~first[real]).all()):
        raise ValueError(
            "position_ids are not those of whole documents: give 0 for a document's first token, behind a cache how "
            "many it has, and one more for each that follows, or leave them out."
        )
    return (ids == 0) & real
