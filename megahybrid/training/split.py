"""ZeRO 3: weights, gradients and optimizer state are split over the replicas, in the buckets of their reduction.

Matrices of layers are gathered when a pass comes to them, but for some layers that stay whole (scaling/splitting.py
says which), as embedding, output layer and vectors do: a collective for little would last as long as one for much.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.parallel import groups
from megahybrid.scaling.memory import BUCKET
from megahybrid.scaling.splitting import is_split, split_matrices
from megahybrid.training.gathering import Gathering, Weights
from megahybrid.training.optimizer import make_optimizer, reset_state
from megahybrid.training.reduction import Bucket, Reduction, has_sums, in_buckets, travelling
from megahybrid.training.zero import WEIGHTS


class SplitOptimizer:
    """Of working copies in bf16 or fp32; masters, their gradients and moments are fp32.

    Attributes:
        optimizer: of the masters, a parameter group each.
        reduction: of the gradients.
    """

    def __init__(self, config: Config, model: nn.Module):
        """The model's parameters become views of what this owns, without values."""
        layers = {layer: model.layers[str(layer)] for layer in split_matrices(config, groups.weight_holders()[1])}
        apart = {layer: [each for each in layers[layer].parameters() if is_split(each.spec)] for layer in layers}
        known = {each for parameters in apart.values() for each in parameters}
        self._whole = _weights((each for each in model.parameters() if each not in known), split=False)
        split = {layer: _weights(parameters, split=True) for layer, parameters in apart.items()}
        self._gathering = Gathering([(layers[layer], weights) for layer, weights in split.items()])
        self._weights = [*self._whole, *(each for weights in split.values() for each in weights)]
        self.optimizer = make_optimizer([each.parameters for each in self._weights], config.optimizer)
        for group, weights in zip(self.optimizer.param_groups, self._weights, strict=True):
            group["params"] = [nn.Parameter(torch.zeros_like(weights.piece, dtype=torch.float32))]
        self.reduction = Reduction([_bucket(each) for each in self._weights], travelling(config.parallel))
        self._places = dict(self._placed())
        self.reset_state(0)

    def _placed(self) -> Iterable[tuple[nn.Parameter, tuple[Tensor, int]]]:
        """Every parameter's master, and where it begins in the whole of which that is a piece."""
        for group, weights in zip(self.optimizer.param_groups, self._weights, strict=True):
            begin = 0
            for parameter in weights.parameters:
                yield parameter, (group["params"][0], begin)
                begin += parameter.numel()

    def reset_state(self, steps: int) -> None:
        """AdamW's state as after `steps` steps, with moments of zero."""
        reset_state(self.optimizer, steps)

    def place(self, parameter: nn.Parameter, kind: str = WEIGHTS) -> tuple[int, Tensor]:
        """Where this rank keeps its shard of a parameter's fp32 weight or moment: a `Place`, perhaps of nothing."""
        master, begin = self._places[parameter]
        piece = master.detach() if kind == WEIGHTS else self.optimizer.state[master][kind]
        first = groups.weight_holders()[0] * len(piece)  # of the whole
        start, end = max(begin, first), min(begin + parameter.numel(), first + len(piece))
        return start - begin, piece[start - first : max(start, end) - first]

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This tensor parallel rank's whole fp32 weight or moment, laid flat; a collective."""
        begin, held = self.place(parameter, kind)
        value = held.new_zeros(parameter.numel())
        value[begin : begin + len(held)] = held
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return value

    @torch.no_grad()
    def round_masters(self) -> None:
        """Make every working copy of the masters; a collective."""
        self._gathering.forget()  # waits for gathers that still read pieces
        for group, weights in zip(self.optimizer.param_groups, self._weights, strict=True):
            weights.piece.copy_(group["params"][0])
        for weights in self._whole:
            weights.gather()
        for weights in self._whole:
            weights.wait()

    def destroy(self) -> None:
        """Leave the model alone, whose parameters stay views of what this owned, in split layers without memory."""
        self._gathering.stop()
        self.reduction.stop()


def _weights(parameters: Iterable[nn.Parameter], split: bool) -> list[Weights]:
    return [Weights(bucket, split) for bucket in in_buckets(parameters, BUCKET)]


def _bucket(weights: Weights) -> Bucket:
    if not has_sums(weights.parameters, zero_stage=3):
        return Bucket(weights.parameters, torch.zeros_like(weights.piece, dtype=torch.float32))
    sums, (rank, holders) = torch.zeros_like(weights.whole, dtype=torch.float32), groups.weight_holders()
    return Bucket(weights.parameters, sums.chunk(holders)[rank], sums)
