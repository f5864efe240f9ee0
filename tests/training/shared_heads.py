"""What workers run where tensor parallel ranks share the KV heads of sliding window attention."""

import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import validate
from tests.model import tiny
from tests.training.steps import LENGTHS, OPTIMIZER, SAMPLES, STEPS, sample

HEADS = 8


def config_of(kv_heads, dtype="fp32", **parallel):
    config = tiny.config("G|SS")
    config.model.gdn.num_heads, config.model.attention.num_heads = 4, HEADS
    config.model.attention.num_kv_heads = kv_heads
    config.train.dtype, config.train.seq_length, config.train.global_batch_size = dtype, sum(LENGTHS), SAMPLES
    config.train.steps = STEPS
    config.parallel, config.optimizer, config.data.path = ParallelConfig(**parallel), OPTIMIZER, "unused"
    validate(config)
    return config


def gradients(kv_heads, parallel):
    """In float64, of one sample: {name: this rank's part}, and the same at full shape."""
    from megahybrid.model.stack import build
    from megahybrid.parallel import groups

    config = config_of(kv_heads, **parallel)
    groups.initialize(config.parallel)
    model, tokens = build(config, "cpu", torch.float64), sample(1, 0)
    model(tokens[:-1], tiny.training_context(LENGTHS), labels=tokens[1:]).loss.backward()
    _, size = groups.tensor_parallel()
    parts = {name: each.grad for name, each in model.named_parameters()}
    specs = {name: each.spec for name, each in model.named_parameters()}
    whole = {
        name: groups.gather_tensor_parallel(part, specs[name].axis, specs[name].copies(size))
        for name, part in parts.items()
    }
    return parts, whole


def steps(kv_heads, dtype, parallel):
    """Two steps of the engine: losses, norms, weights and moments at full shape, and this rank's parts of weights."""
    from megahybrid.data.packing import Batch
    from megahybrid.parallel import groups
    from megahybrid.training import zero
    from megahybrid.training.engine import Engine
    from megahybrid_kernels import Sequences
    from tests.training.steps import states

    config = config_of(kv_heads, dtype, **parallel)
    groups.initialize(config.parallel)
    engine = Engine(config)
    engine.initialize()
    replica, replicas = groups.data_parallel()
    found = {"losses": [], "norms": []}
    for step in range(1, STEPS + 1):
        batches = []
        for number in range(replica, SAMPLES, replicas):
            tokens = sample(step, number)
            positions = torch.arange(len(tokens) - 1)
            where = torch.full_like(positions, number), positions
            batches.append(Batch(tokens[:-1], tokens[1:], Sequences.of(LENGTHS), *where))
        result = engine.step(batches, step)
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
    parts = {
        (name, kind): engine.zero.read(each, kind).detach().clone()
        for name, each in engine.model.named_parameters()
        for kind in zero.KINDS
    }
    return found, states(engine), parts


def train(recipe, *overrides):
    from megahybrid.config import load_config
    from megahybrid.training.loop import train

    train(load_config(recipe, overrides))
