"""The tokens of a source's training documents → shards, in blocks whose cut depends on the documents alone.

So the shards do not depend on how the source's files are cut into units: the same documents in the same order are the
same shards, whichever format or compression they come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.documents import TRAIN
from megahybrid.data.order import permutation
from megahybrid.data.units import Format, finish, whole_folder
from megahybrid.data.writing import SampleWriter

# Tokens whose documents are held in memory and shuffled at once: a shard of uint16, two of uint32.
BLOCK_TOKENS = 15 << 20
_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Part:
    """A stretch of a unit's train.bin: the documents that begin in it are its."""

    file: str
    """Path of train.bin."""
    begin: int
    """Its first token."""
    end: int
    """The token after its last."""


@dataclass(frozen=True)
class Block:
    """The documents of a source that begin in so many consecutive tokens."""

    source: str
    """Name of the source."""
    number: int
    """Its place in the source's order."""
    shuffle: bool
    """Whether the documents change places: those of text files come in a random order already."""
    document_id: int
    """The token that begins every document."""
    parts: list[Part]
    """In the order in which they are read."""
    bytes: int
    """Size of its parts."""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Block:
        """From plain values."""
        return cls(**{**values, "parts": [Part(**part) for part in values["parts"]]})


def blocks_of(
    source: str, shuffle: bool, document_id: int, files: Sequence[tuple[Path, int]], width: int
) -> Iterator[Block]:
    """The blocks of a source whose units left these files, each with its number of tokens of `width` bytes."""

    def block() -> Block:
        return Block(source, number, shuffle, document_id, parts, sum(part.end - part.begin for part in parts) * width)

    parts: list[Part] = []
    number, room = 0, BLOCK_TOKENS
    for file, tokens in files:
        begin = 0
        while begin < tokens:
            end = min(begin + room, tokens)
            parts.append(Part(str(file), begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield block()
                parts, number, room = [], number + 1, BLOCK_TOKENS
    if parts or not number:
        yield block()


def write_block(block: Block, made: Format, folder: Path, advance: Callable[[int], Any]) -> None:
    """Turn a block into `folder`, whole: train/ with its shards, and rest.bin with the tokens that do not fill a sample
    and are laid together with other blocks'. `advance(bytes)` is told of the tokens' bytes."""
    tokens = np.concatenate([np.empty(0, made.dtype), *(_tokens(part, made.dtype, block) for part in block.parts)])
    with whole_folder(folder) as place:
        with SampleWriter(place / TRAIN, made.seq_length, made.dtype, made.shard_bytes) as writer:
            for documents in _in_groups(tokens, block):
                writer.add(documents)
        rest = writer.rest
        if len(rest) and rest[0] != block.document_id:  # it will follow another block's document
            rest = np.concatenate([np.array([block.document_id], made.dtype), rest])
        (place / "rest.bin").write_bytes(rest.tobytes())
        finish(place, {})
    advance(block.bytes)


def _tokens(part: Part, dtype: str, block: Block) -> NDArray:
    """Of the documents that begin in the part, to their ends."""
    width = np.dtype(dtype).itemsize
    with open(part.file, "rb") as file:
        file.seek(part.begin * width)
        tokens = np.frombuffer(file.read((part.end - part.begin) * width), dtype)
        starts = np.flatnonzero(tokens == block.document_id)
        if not len(starts):
            return tokens[:0]
        pieces = [tokens[starts[0] :]]
        while data := file.read(_TOKENS_AT_ONCE * width):  # the rest of the last one
            more = np.frombuffer(data, dtype)
            ends = np.flatnonzero(more == block.document_id)
            pieces.append(more[: ends[0]] if len(ends) else more)
            if len(ends):
                break
    return np.concatenate(pieces)


def _in_groups(tokens: NDArray, block: Block) -> Iterator[list[NDArray]]:
    """The documents in the block's order, some at a time: there may be millions."""
    starts = np.flatnonzero(tokens == block.document_id)
    ends = np.append(starts[1:], len(tokens))
    order = permutation(len(starts), "documents", block.source, block.number) if block.shuffle else range(len(starts))
    group: list[NDArray] = []
    size = 0
    for i in order:
        group.append(tokens[starts[i] : ends[i]])
        size += len(group[-1])
        if size >= _TOKENS_AT_ONCE:
            yield group
            group, size = [], 0
    yield group
