"""The micro-batches of a step through this rank's pipeline stages, by Megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megahybrid.model.stack import Stack
from megahybrid.parallel import groups

MicroBatch = TypeVar("MicroBatch")


def run(
    stages: Sequence[Stack],
    micro_batches: Sequence[MicroBatch],
    tokens: int,
    forward: Callable[[Stack, MicroBatch], Tensor],
    backward: bool = True,
) -> None:
    """Forward and backward passes: 1F1B, interleaved where this rank has several stages, or one after the other
    without a pipeline. Gradients are left on the parameters, as of the mean over the micro-batches, each stage's own,
    times the number of context parallel ranks, over which a mean is to be taken.

    Args:
        stages: this rank's.
        micro_batches: at least one, the same on all ranks of a replica.
        tokens: what every micro-batch holds, over all context parallel ranks.
        forward: of one stage and micro-batch; gives the stage's hidden states, or the loss where it is the last one,
            this context parallel rank's part of it.
        backward: whether there are backward passes.
    """

    _, ranks = groups.context_parallel()

    def mean(loss: Tensor) -> tuple[Tensor, int, None]:
        # Megatron-core's own division takes four launches where there is nothing to divide, too.
        if ranks > 1:
            loss = loss * ranks
        return loss if len(micro_batches) == 1 else loss / len(micro_batches), 0, None

    def step(iterator, stage: Stack):
        return forward(stage, next(iterator)), mean

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
