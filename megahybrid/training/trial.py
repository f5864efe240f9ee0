"""Real training steps on random tokens and weights, without data or anything written: `python -m … CONFIG STEPS` on one
device prints what measuring.py reads."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from megahybrid.config import Config, load_config
from megahybrid.data.packing import Batch
from megahybrid.devices import prepare_allocator
from megahybrid.errors import UserError
from megahybrid.parallel import groups
from megahybrid.training.engine import Engine
from megahybrid_kernels import Sequences


def main(file: Path, steps: int) -> dict:
    """The device's name and the seconds of every step. Raises UserError where it has too little memory."""
    config = load_config(file)
    prepare_allocator(config.train.cuda_graph)
    groups.initialize(config.parallel, config.train.seed)
    try:
        engine = Engine(config)
        engine.initialize()
        batches, seconds = random_batches(config), []
        for step in range(1, steps + 1):
            began = time.perf_counter()
            engine.step(batches, step)
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        raise UserError("The GPU has too little memory; give a smaller train.micro_batch_size.") from error
    finally:
        groups.shut_down()
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "seconds": seconds}


def random_batches(config: Config) -> list[Batch]:
    """This replica's micro-batches of a global batch that every layout shares; each sample is one document."""
    count, length, micro = config.train.global_batch_size, config.train.seq_length, config.train.micro_batch_size
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = torch.randint(config.model.vocab_size, (count, length + 1), generator=generator)
    replica, replicas = groups.data_parallel()
    numbers = torch.arange(count)[replica::replicas]
    return [_batch(tokens[own], own) for own in numbers.split(micro)]


def _batch(tokens: torch.Tensor, samples: torch.Tensor) -> Batch:
    count, length = tokens.shape[0], tokens.shape[1] - 1
    inputs, labels = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    positions = torch.arange(length).repeat(count)
    return Batch(inputs, labels, Sequences.of((length,) * count), samples.repeat_interleave(length), positions)


if __name__ == "__main__":
    try:
        print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
    except UserError as error:
        sys.exit(str(error))
