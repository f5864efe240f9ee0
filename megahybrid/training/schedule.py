"""The micro-batches of a step through this rank's pipeline stages, by Megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import functional

from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.scaling.memory import BUCKET

MicroBatch = TypeVar("MicroBatch")


def run(
    stages: Sequence[Stack],
    micro_batches: Sequence[MicroBatch],
    tokens: int,
    forward: Callable[[Stack, MicroBatch], Tensor],
    backward: bool = True,
) -> None:
    """Forward and backward passes: 1F1B, interleaved where this rank has several stages, or one after the other
    without a pipeline. Gradients are left on the parameters, as of the mean over the micro-batches, times the number of
    context parallel ranks, over which a mean is to be taken: Megatron-core multiplies the loss by that.

    Args:
        stages: this rank's.
        micro_batches: at least one, the same on all ranks of a replica.
        tokens: what every micro-batch holds, over all context parallel ranks.
        forward: of one stage and micro-batch; gives the stage's hidden states, or the loss where it is the last one,
            this context parallel rank's part of it.
        backward: whether there are backward passes.
    """

    def step(iterator, stage: Stack):
        return forward(stage, next(iterator)), lambda loss: (loss, None)

    interleaved = len(stages) > 1
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in stages] if interleaved else iter(micro_batches),
        model=list(stages) if interleaved else stages[0],
        num_microbatches=len(micro_batches),
        seq_length=tokens,
        micro_batch_size=1,
        forward_only=not backward,
    )
    if backward:
        _sum_tied_gradient(stages)


def _sum_tied_gradient(stages: Sequence[Stack]) -> None:
    """Sum a tied embedding's gradient over the first and the last stage: each has a copy, and they stay equal to the
    last bit, of which a checkpoint holds one."""
    tied = stages[0].settings.model.tie_embeddings and parallel_state.get_pipeline_model_parallel_world_size() > 1
    for stage in stages:
        if tied and stage.first != stage.last:
            weight = stage.embedding.weight
            # In bf16 DeepSpeed accumulates in fp32, in an attribute of its own.
            gradient = weight.grad if getattr(weight, "_hp_grad", None) is None else weight._hp_grad
            dist.all_reduce(gradient, group=parallel_state.get_embedding_group())
            sum_in_order(gradient)


def sum_in_order(gradient: Tensor) -> None:
    """Sum a gradient over all holders of the weight in the order of their ranks; each is left with a part of the sum,
    and zeros. What then sums over them once more gives the same bits wherever in its buffers the parameter lies: on
    both stages that have a copy of it.
    """
    holder, holders = groups.weight_holders()
    if holders < 3:  # two summands have no order
        return
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for piece in gradient.view(-1).split(BUCKET):
        share = -(-len(piece) // holders)
        given = functional.pad(piece, (0, share * holders - len(piece)))
        received = torch.empty_like(given)
        dist.all_to_all_single(received, given, group=group)
        first, *others = received.split(share)
        for other in others:
            first += other
        mine = piece.zero_()[holder * share :][:share]
        mine.copy_(first[: len(mine)])
