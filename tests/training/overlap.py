"""What workers tell of a step's order, and how often the host waits for the device in it."""

import traceback

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"cpu", "tolist", "numpy"}  # of Tensor, for which a CPU's tensors call no kernel
KERNELS = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.equal"}
ON_CPU_ALONE = {"_check_values"}  # functions that ops call for a CPU's tensors


def engine_of(dtype, parallel):
    from megahybrid.parallel import groups
    from megahybrid.training import sharded, split
    from megahybrid.training.engine import Engine
    from tests.training.steps import batches_of, config_of

    config = config_of(dtype, True, parallel)
    groups.initialize(config.parallel)
    sharded.BUCKET = split.BUCKET = 3000
    engine = Engine(config)
    engine.initialize()
    return engine, batches_of


def events(dtype, parallel):
    """In a step, in their order: the name of every parameter that has got its gradient, and "reduced" for every
    reduction over the replicas that has begun."""
    engine, batches_of = engine_of(dtype, parallel)
    found, begin = [], dist.reduce_scatter_tensor
    for name, parameter in engine.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))

    def noted(*arguments, **options):
        found.append("reduced")
        return begin(*arguments, **options)

    dist.reduce_scatter_tensor = noted
    try:
        engine.step(batches_of(1), 1)
    finally:
        dist.reduce_scatter_tensor = begin
    return found


class HostWaits(TorchFunctionMode):
    """Counts reads of tensors as if all were on a device but those that `.cpu()` has given."""

    def __init__(self):
        super().__init__()
        self.found, self.host = [], set()

    def __torch_function__(self, function, types, arguments=(), options=None):
        name, result = function.__name__, function(*arguments, **(options or {}))
        if name in READS and not self.on_host(arguments[0]):
            self.found.append(name)
        if name == "cpu":
            self.host.add(result.untyped_storage().data_ptr())
        return result

    def on_host(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.host


class Kernels(TorchDispatchMode):
    """Adds the kernels whose result, or its size, the host waits for."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function.overloadpacket)
        by_mask = name == "aten.index" and any(x is not None and x.dtype == torch.bool for x in arguments[1])
        if (name in KERNELS or by_mask) and not self.waits.on_host(arguments[0]):
            frames = traceback.extract_stack()
            if not any(frame.name in ON_CPU_ALONE for frame in frames):
                self.waits.found.append(f"{name}: {[f'{frame.filename}:{frame.lineno}' for frame in frames[-12:-1]]}")
        result = function(*arguments, **(options or {}))
        if any(isinstance(each, torch.Tensor) and self.waits.on_host(each) for each in arguments):
            self.waits.host |= {
                each.untyped_storage().data_ptr() for each in tree_leaves(result) if torch.is_tensor(each)
            }
        return result


def host_waits(dtype, parallel):
    """What the host waits for in the second step."""
    engine, batches_of = engine_of(dtype, parallel)
    engine.step(batches_of(1), 1)
    waits, synchronize = HostWaits(), torch.cuda.synchronize
    torch.cuda.synchronize = lambda *arguments, **options: waits.found.append("synchronize")
    try:
        with waits, Kernels(waits):
            result = engine.step(batches_of(2), 2)
    finally:
        torch.cuda.synchronize = synchronize
    assert result.skipped is None
    return waits.found
