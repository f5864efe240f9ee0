"""A checkpoint as a model that generates, split by heads over all processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from megahybrid.config import load_config
from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import require_split
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.devices import DTYPES
from megahybrid.errors import UserError
from megahybrid.inference.generate import Generator
from megahybrid.model.fallbacks import kernel_notes
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.parallel.joined import join_weights
from megahybrid.training import checkpoint, checkpoint_folder

log = logging.getLogger("megahybrid")


def load_generator(path: Path, dtype: torch.dtype | None = None) -> Generator:
    """Load a run directory's newest checkpoint, or a checkpoint folder inside one, whatever layout wrote it.

    Its weights are rounded to `dtype`: when left out, that of training's passes on a GPU, else fp32. The tensor
    parallel size is the number of processes. Raises UserError if there is no checkpoint, it is damaged, or its model
    does not split into so many parts.
    """
    folder = checkpoint_folder.find(path)
    if folder is None:
        raise UserError(
            f"There is no checkpoint in '{path}'; give a run directory that `megahybrid train` has saved in, or an "
            "exported model."
        )
    config = load_config(folder / "config.yaml")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require_split(config, processes)
    config.parallel = ParallelConfig(tensor=processes)
    tokenizer = Tokenizer.load(folder / checkpoint_folder.TOKENIZER)
    if not groups.joined():
        groups.initialize(config.parallel)
    model = Stack(config)
    checkpoint.load_weights(folder, model)
    if dtype is None:
        dtype = DTYPES[config.train.dtype] if groups.device().type == "cuda" else torch.float32
    if groups.is_main():
        for note in kernel_notes(config, groups.device(), dtype, training=False):
            log.warning(note)
    model.to(groups.device(), dtype).requires_grad_(False)
    join_weights(model)
    return Generator(model, tokenizer)
