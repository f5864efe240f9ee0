"""Tensors on disk in the safetensors format: written and hashed in one pass, read in part."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megahybrid.parallel.parameters import ParameterSpec

_PIECE = 1 << 26


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp32 tensors in host memory durably; returns the file's `bytes` and `blake2b`.

    safetensors' own writer copies every tensor while it holds the interpreter, which would slow the training that goes
    on beside it; writing and hashing here do not hold it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.blake2b(), 0
    with open(file, "wb") as out:
        views = (memoryview(tensor.numpy().reshape(-1)).cast("B") for tensor in tensors.values())
        for part in (len(text).to_bytes(8, "little"), text, *views):
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


def read_part(file: Path, name: str, spec: ParameterSpec, rank: int, size: int) -> Tensor:
    """The part of a tensor of shape spec.shape that tensor parallel rank `rank` of `size` holds."""
    with safe_open(file, "pt") as tensors:
        if spec.axis is None or size == 1:
            return tensors.get_tensor(name)
        length = spec.shape[spec.axis] // size
        part = slice(rank * length, (rank + 1) * length)
        return tensors.get_slice(name)[(slice(None),) * spec.axis + (part,)]
