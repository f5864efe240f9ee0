"""Selection where ranks that split heads share a KV head, each with some of the query heads that select together.

A block's score is a sum over all of these heads, but scores are as many as tokens times blocks. So ranks exchange their
queries: each scores a share of the tokens, with all heads, and the chosen blocks go to all. They do so in the group of
all tensor (and context) parallel ranks, where others get nothing: of collectives on one communicator none waits for
another rank's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megahybrid.parallel import groups
from megahybrid_kernels import Sequences
from megahybrid_kernels.native_sparse_attention import select_blocks


@torch.no_grad()
def select_together(
    q: Tensor, k: Tensor, sequences: Sequences, block_size: int, num_blocks: int, ranks: int
) -> Tensor | None:
    """What `select_blocks` chooses by the queries of all `ranks` neighbours, who share these KV heads; called by all of
    them. None where there is no choice, since all documents have at most `num_blocks` blocks.

    Args:
        q, k: as for `select_blocks`, with this rank's query heads.
    """
    every = block_size * num_blocks
    if max(sequences.lengths) <= every:
        return None
    group, members = _group(), neighbours(ranks)
    borders = shares(sequences.lengths, every, ranks)
    first, end = borders[members.index(dist.get_rank(group)) :][:2]
    counts, mine = [0] * dist.get_world_size(group), [0] * dist.get_world_size(group)
    for member, (begin, after) in zip(members, itertools.pairwise(borders), strict=True):
        counts[member], mine[member] = after - begin, end - first
    received = q.new_empty(ranks, end - first, *q.shape[1:])
    dist.all_to_all_single(received.flatten(0, 1), q.contiguous(), mine, counts, group)
    chosen = select_blocks(side_by_side(received), k, sequences, block_size, num_blocks, (first, end))
    selection = chosen.new_empty(sequences.tokens, *chosen.shape[1:])
    dist.all_to_all_single(selection, chosen.repeat(ranks, 1, 1), counts, mine, group)
    return selection


def all_queries(q: Tensor, ranks: int) -> Tensor:
    """`[tokens, heads of this rank, head_dim]` -> those of all `ranks` neighbours, who share their KV heads."""
    whole = q.new_empty(dist.get_world_size(_group()), *q.shape)
    dist.all_gather_into_tensor(whole.flatten(0, 1), q.contiguous(), _group())
    return side_by_side(whole[neighbours(ranks)])


def neighbours(ranks: int) -> list[int]:
    """The `ranks` members of the group among which this one is that have the same KV heads, in its order."""
    (rank, _), (_, tensors), (_, contexts) = groups.head_parallel(), groups.tensor_parallel(), groups.context_parallel()
    first = rank - rank % ranks
    return sorted(each % contexts * tensors + each // contexts for each in range(first, first + ranks))


def _group() -> dist.ProcessGroup:
    """All ranks that split heads; of equal context parallel ranks the tensor parallel ones follow each other."""
    if groups.context_parallel()[1] == 1:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_tensor_and_context_parallel_group()


def side_by_side(parts: Tensor) -> Tensor:
    """`[ranks, tokens, heads, head_dim]` -> `[tokens, ranks * heads, head_dim]`."""
    return parts.transpose(0, 1).flatten(1, 2)


def shares(lengths: Sequence[int], every: int, ranks: int) -> list[int]:
    """Borders of the ranks' tokens, which take equally long to score: as long as there are tokens before them, in
    documents of more than `every`."""
    costs = [length**2 if length > every else 0 for length in lengths]
    dues = [sum(costs) * rank // ranks for rank in range(1, ranks)]
    borders, begin, before = [0], 0, 0
    for length, cost in zip(lengths, costs, strict=True):
        borders += [begin + math.isqrt(due - before) for due in dues if before < due <= before + cost]
        begin, before = begin + length, before + cost
    return [*borders, begin]
