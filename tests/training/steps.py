"""Optimizer steps of a tiny model by the engine, in any layout, and by plain autograd and torch's AdamW."""

import functools
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megahybrid.config.schema import OptimizerConfig, ParallelConfig
from megahybrid.config.validate import validate

SAMPLES, LENGTHS, STEPS = 4, (23, 9), 2
# An epsilon that gradients are not far above of: updates show their size, and not the sign of what is nearly zero.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.01, schedule="constant", betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5, clip_grad_norm=0.3
)


def config_of(dtype, tied, parallel, vocab_size=None):
    from tests.model import tiny

    config = tiny.config("GLSNF", tie_embeddings=tied)
    config.train.dtype, config.train.seq_length, config.train.global_batch_size = dtype, sum(LENGTHS), SAMPLES
    config.train.steps = STEPS
    config.model.vocab_size = vocab_size or config.model.vocab_size
    config.parallel, config.optimizer, config.data.path = ParallelConfig(**parallel), OPTIMIZER, "unused"
    validate(config)
    # Smaller blocks than a recipe may have, so that a document has some to choose among.
    config.model.nsa.block_size, config.model.nsa.window_size = 4, 5
    return config


def sample(step, number):
    from tests.model import tiny

    return tiny.tokens(LENGTHS, seed=SAMPLES * step + number)


def batches_of(step):
    """This replica's micro-batches."""
    from megahybrid.data.packing import Batch
    from megahybrid.parallel import groups
    from megahybrid_kernels import Sequences

    replica, replicas = groups.data_parallel()
    batches = []
    for number in range(replica, SAMPLES, replicas):
        tokens = sample(step, number)
        positions = torch.arange(len(tokens) - 1)
        where = torch.full_like(positions, number)
        batches.append(Batch(tokens[:-1], tokens[1:], Sequences.of(LENGTHS), where, positions))
    return batches


def by_engine(dtype, parallel, tied=True, vocab_size=None):
    """What this rank knows: a list of `losses`, `norms`, and of the weights and moments before and after every step, by
    kind and name at full shape; and how many elements of each type the replicas summed in a step."""
    from megahybrid.parallel import groups
    from megahybrid.training.engine import Engine

    config = config_of(dtype, tied, parallel, vocab_size)
    groups.initialize(config.parallel)
    engine = Engine(config)
    engine.initialize()
    found = {"losses": [], "norms": [], "states": [states(engine)], "sums": []}
    for step in range(1, STEPS + 1):
        batches = batches_of(step)
        with summed() as sums:
            result = engine.step(batches, step)
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["states"].append(states(engine))
        found["sums"].append(dict(sums))
    return found


def states(engine):
    from megahybrid.parallel import groups
    from megahybrid.training import zero

    _, size = groups.tensor_parallel()
    found = {kind: {} for kind in zero.KINDS}
    for name, parameter in engine.model.named_parameters():
        for kind in zero.KINDS:
            local = engine.zero.read(parameter, kind).view(parameter.spec.local_shape(size))
            value = groups.gather_tensor_parallel(local, parameter.spec.axis, parameter.spec.copies(size))
            found[kind][name] = value.detach().clone()
    return found


def add_product(master, dy, x):
    master.grad += dy.double().T @ x.double() / SAMPLES


@contextmanager
def summed():
    """Counts the elements that this rank gives to sums over its data parallel group, by type."""
    from megatron.core import parallel_state

    group, sums = dist.get_process_group_ranks(parallel_state.get_data_parallel_group()), Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = str(function)
            if name.startswith("c10d.") and "reduce" in name:
                process_group = next(each for each in arguments if isinstance(each, torch.ScriptObject))
                ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(process_group))
                given = arguments[1] if "scatter" in name else arguments[0]
                for tensor in [given] if isinstance(given, torch.Tensor) else given:
                    if ranks == group and tensor.is_floating_point() and tensor.dtype != torch.float64:
                        sums[str(tensor.dtype)] += tensor.numel()
            return function(*arguments, **(options or {}))

    with Watch():
        yield sums


def by_torch(dtype, tied=True, vocab_size=None, products=False):
    """The same of one process, as `by_engine`: a sample after the other through the model, gradients added up and
    divided in float64; with `products` those of projections' weights are never rounded before."""
    from megahybrid.model.context import Context
    from megahybrid.model.stack import build
    from megahybrid.parallel import groups
    from megahybrid_kernels import Sequences, dropout_keys

    config = config_of(dtype, tied, {}, vocab_size)
    groups.initialize(config.parallel)
    model = build(config, "cpu")
    masters = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    matrices = [master for master in masters.values() if master.ndim > 1]
    vectors = [master for master in masters.values() if master.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0}, {"params": matrices, "weight_decay": 0.5}],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-3,
    )
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    for name, parameter in model.named_parameters() if products else ():
        parameter.add_product = functools.partial(add_product, masters[name])
    found = {"losses": [], "norms": [], "states": [{"weights": {n: m.clone() for n, m in masters.items()}}]}
    for step in range(1, STEPS + 1):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name])
            masters[name].grad = torch.zeros_like(masters[name])
        loss = 0.0
        for number in range(SAMPLES):
            tokens = sample(step, number)
            where = torch.arange(sum(LENGTHS))
            keys = dropout_keys(torch.zeros_like(where), where, 0, step, 5)
            out = model(tokens[:-1], Context(Sequences.of(LENGTHS), keys), labels=tokens[1:])
            gradients = torch.autograd.grad(out.loss / len(where), list(model.parameters()), allow_unused=products)
            for master, gradient in zip(masters.values(), gradients, strict=True):
                master.grad += 0 if gradient is None else gradient.double() / SAMPLES
            loss += float(out.loss) / len(where) / SAMPLES
        found["losses"].append(loss)
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), 0.3)))
        adamw.step()
        moments = {k: {n: adamw.state[m][k].clone() for n, m in masters.items()} for k in ("exp_avg", "exp_avg_sq")}
        found["states"].append({"weights": {n: m.clone() for n, m in masters.items()}, **moments})
    return found
