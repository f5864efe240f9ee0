"""Tensors on disk in the safetensors format: written and hashed in one pass, read in part."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megahybrid.parallel.parameters import ParameterSpec

_PIECE = 1 << 26
_BYTES = {"F32": 4, "BF16": 2}


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp32 tensors in host memory durably; returns the file's `bytes` and `blake2b`."""
    return write_stream(file, {name: ("F32", tensor.shape) for name, tensor in tensors.items()}, tensors.values())


def write_stream(
    file: Path, entries: Mapping[str, tuple[str, Sequence[int]]], tensors: Iterable[Tensor]
) -> dict[str, Any]:
    """Write tensors that come one by one; `entries` has each one's type (F32 or BF16) and shape, in the same order.

    safetensors' own writer copies every tensor while it holds the interpreter, which would slow the training that goes
    on beside it, and needs all of them at once; writing and hashing here do neither.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.blake2b(), 0
    with open(file, "wb") as out:
        views = (memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors)
        for part in itertools.chain((len(text).to_bytes(8, "little"), text), views):
            for begin in range(0, len(part), _PIECE):
                piece = part[begin : begin + _PIECE]
                out.write(piece)
                digest.update(piece)
            size += len(part)
        out.flush()
        os.fsync(out.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def facts_of(file: Path) -> dict[str, Any]:
    """What `write_tensors` returned for this file, if it has not changed."""
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "blake2b": hashlib.file_digest(handle, "blake2b").hexdigest()}


def read_part(file: Path, name: str, spec: ParameterSpec, rank: int, size: int, elements: range) -> Tensor:
    """Consecutive `elements` of the part, laid flat, that tensor parallel rank `rank` of `size` holds of a tensor of
    shape spec.shape; only the rows they are in are read."""
    local = spec.local_shape(size)
    row = math.prod(local[1:])
    first, end = elements.start // row, -(-elements.stop // row)
    part, _ = spec.place(rank, size)
    at = [(first, end), *((0, length) for length in local[1:])]
    if spec.axis is not None:
        at[spec.axis] = tuple(part * local[spec.axis] + each for each in at[spec.axis])
    with safe_open(file, "pt") as tensors:
        rows = tensors.get_slice(name)[tuple(slice(*each) for each in at)]
    return rows.reshape(-1)[elements.start - first * row :][: len(elements)]
