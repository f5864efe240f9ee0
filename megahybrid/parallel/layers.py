"""Tensor parallel layers on Megatron-core's groups.

A mixer or MLP gathers its input once, in `project`, for any number of column-split projections, and leaves through one
row-split projection that reduces. Hidden states are `[tokens, 1, hidden]`; with sequence parallelism the residual
stream holds `tokens / tensor` rows outside. While tensors travel, what can be multiplied is: a rank's own rows while it
gathers the others', weight gradients while the input's is reduced (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import VocabParallelEmbedding, mappings
from torch import Tensor, nn

from megahybrid.parallel import groups
from megahybrid.parallel.parameters import Initializer, ParameterSpec, attach_spec, parameter
from megahybrid_kernels.gemv import add_rms_norm_gemv, takes_gemv
from megahybrid_kernels.norm import add_rms_norm, rms_norm
from megahybrid_kernels.untracked import applied

# Rows of a weight whose product takes as long as reading x does, whether they are of one or of several projections.
_FEW_ROWS = 16


def enter(x: Tensor, sequence_parallel: bool) -> Tensor:
    """The input of the output layer: all tokens, with its gradient reduced over the tensor parallel ranks."""
    if sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x)
    return mappings.copy_to_tensor_model_parallel_region(x)


def shared(weight: Tensor) -> Tensor:
    """`weight`, of which every tensor parallel rank may see only a part of the uses: other tokens under sequence
    parallelism, or its own heads. Then its gradient is summed over these ranks, in fp32 at least: here, unless the
    owner of gradients does it once a step (training/reduction.py)."""
    return _Shared.apply(weight) if weight.partial else weight


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=_group())
        return total.to(grad.dtype)


class ColumnLinear(nn.Module):
    """y = x Wᵀ with W `[out, in]` split over its rows, into `parts` at most: with more ranks, neighbours hold the same
    rows, and each uses y for itself. W's gradient is summed over them, in fp32 at least.

    It is applied by `project`, with those that share its input, in the forward of the module that holds them.
    """

    def __init__(self, in_features: int, out_features: int, initializer: Initializer, parts: int | None = None):
        super().__init__()
        self.weight = parameter(out_features, in_features, axis=0, initializer=initializer, parts=parts)
        self.copies = self.weight.spec.copies(groups.tensor_parallel()[1])
        self.joined: Joined | None = None


class Joined(NamedTuple):
    """Projections of one input whose weights are views of one, see `parallel.joined`.

    Attributes:
        layers: in the order of their rows.
        weight: `[rows, in]`, theirs and some of 0 behind them.
        sizes: each one's rows, and how many of 0 there are.
        places: each one's address.
    """

    layers: tuple[ColumnLinear, ...]
    weight: Tensor
    sizes: list[int]
    places: list[int]

    def holds(self, layers: Sequence[ColumnLinear]) -> bool:
        """Whether it is of these, and their weights are still where they were."""
        return self.layers == tuple(layers) and self.places == [layer.weight.data_ptr() for layer in layers]


class NormOfARow(NamedTuple):
    """One token's norm before the projections that read it, which make it along with their product if they are joined.

    Attributes:
        x: `[1, 1, hidden]`, or an addend to the residual stream.
        residual, total: the stream before and, to be written, after it; None where there is no addend.
        weight, eps: the norm's.
    """

    x: Tensor
    residual: Tensor | None
    total: Tensor | None
    weight: Tensor
    eps: float

    def alone(self) -> Tensor:
        """`[1, 1, hidden]`: the norm."""
        if self.total is None:
            return rms_norm(self.x, self.weight, self.eps)
        y, total = add_rms_norm(self.x, self.residual, self.weight, self.eps)
        self.total.copy_(total)
        return y

    def times(self, weight: Tensor) -> Tensor:
        """`[1, out]`: its product with weight `[out, hidden]`."""
        return add_rms_norm_gemv(self.x, self.residual, self.weight, self.eps, weight, self.total, ahead=True)


def project(x: Tensor | NormOfARow, layers: Sequence[ColumnLinear], sequence_parallel: bool) -> tuple[Tensor, ...]:
    """Hidden states, this rank's, → each layer's output `[tokens, out]`, the tokens being all ranks'."""
    joined, of_a_row = layers[0].joined, isinstance(x, NormOfARow)
    if joined is not None and not torch.is_grad_enabled() and not sequence_parallel and joined.holds(layers):
        y = x.times(joined.weight) if of_a_row else x.squeeze(1) @ joined.weight.T
        return y.split_with_sizes(joined.sizes, 1)[: len(layers)]
    if of_a_row:
        x = x.alone()
    weights, copies = [layer.weight for layer in layers], [layer.copies for layer in layers]
    few = [*itertools.takewhile(lambda n: copies[n] == 1 and len(weights[n]) <= _FEW_ROWS, range(len(layers))[::-1])]
    if len(few) < 2:
        return applied(_Projections, x.squeeze(1), sequence_parallel, copies, *weights)
    together = weights[few[-1] :]
    del weights[few[-1] :], copies[few[-1] + 1 :]
    *outputs, y = applied(_Projections, x.squeeze(1), sequence_parallel, copies, *weights, torch.cat(together))
    return *outputs, *y.split([len(weight) for weight in together], 1)


class _Projections(torch.autograd.Function):
    """Autograd alone would write one input gradient a projection and add them up in kernels of their own. The last
    one's is first: where it has few rows, it is bound by what it writes, and would have to read it, too."""

    @staticmethod
    def forward(ctx, x: Tensor, sequence_parallel: bool, copies: Sequence[int], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.sequence_parallel, ctx.copies = sequence_parallel, copies
        if sequence_parallel:
            x, outputs = _gathered_products(x, [weight.T for weight in weights])
        else:
            outputs = [x @ weight.T for weight in weights]
        ctx.save_for_backward(x, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dx = grads[-1] @ weights[-1]
        for grad, weight in zip(grads[:-1], weights[:-1], strict=True):
            dx.addmm_(grad, weight)
        dx, reduced = _start_reduction(dx, ctx.sequence_parallel)
        # Of copies each rank's heads have used one for themselves.
        copied = [number for number, copies in enumerate(ctx.copies) if copies > 1]
        sums, summed = _start_sum_over_copies([grads[n].T @ x for n in copied], [ctx.copies[n] for n in copied])
        weight_grads = [
            None if number in copied else _weight_gradient(weight, grad, x)
            for number, (weight, grad) in enumerate(zip(weights, grads, strict=True))
        ]
        reduced.wait()
        summed.wait()
        for number, total in zip(copied, sums, strict=True):
            weight_grads[number] = total.to(x.dtype)
        return dx, None, None, *weight_grads


class RowLinear(nn.Module):
    """y = x Wᵀ with W `[out, in]` split over its columns; x `[tokens, in]` is this rank's part of the features, y
    `[tokens, 1, out]` whole."""

    def __init__(self, in_features: int, out_features: int, initializer: Initializer, sequence_parallel: bool):
        super().__init__()
        self.weight = parameter(out_features, in_features, axis=1, initializer=initializer)
        self.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return applied(_ReducedProduct, x, self.weight, self.sequence_parallel).unsqueeze(1)

    def takes_gemv(self, x: Tensor, head_dim: int = 1) -> bool:
        """Whether the product is made along with what makes its input of x, see the op of that name."""
        alone = not torch.is_grad_enabled() and groups.tensor_parallel()[1] == 1
        return alone and takes_gemv(x, self.weight, head_dim)


class _ReducedProduct(torch.autograd.Function):
    """x Wᵀ summed over the ranks."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sequence_parallel: bool) -> Tensor:
        ctx.sequence_parallel = sequence_parallel
        ctx.save_for_backward(x, weight)
        y, reduced = _start_reduction(x @ weight.T, sequence_parallel)
        reduced.wait()
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            dy, (dx,) = _gathered_products(dy, [weight])
        else:
            dx = dy @ weight
        return dx, _weight_gradient(weight, dy, x), None


def _weight_gradient(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """dyᵀ x, or nothing where the owner of gradients lets the product add it to its sums (training/reduction.py)."""
    add_product = getattr(weight, "add_product", None)
    return dy.T @ x if add_product is None else add_product(dy, x)


def _gathered_products(x: Tensor, matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All ranks' rows of x, and their product with each matrix."""
    (rank, ranks), rows = groups.tensor_parallel(), len(x)
    whole = x.new_empty(ranks * rows, x.shape[1])
    gathered = dist.all_gather_into_tensor(whole, x.contiguous(), _group(), async_op=True)
    products = [x.new_empty(len(whole), matrix.shape[1]) for matrix in matrices]
    own = slice(rank * rows, (rank + 1) * rows)
    _multiply(x, matrices, [product[own] for product in products])
    gathered.wait()
    for others in (slice(0, own.start), slice(own.stop, None)):
        _multiply(whole[others], matrices, [product[others] for product in products])
    return whole, products


def _multiply(x: Tensor, matrices: Sequence[Tensor], products: Sequence[Tensor]) -> None:
    for matrix, product in zip(matrices, products, strict=True):
        if len(x):
            torch.mm(x, matrix, out=product)


class _Nothing:
    """To wait for where there is one rank."""

    def wait(self) -> None:
        """Return at once."""


def _start_reduction(x: Tensor, sequence_parallel: bool) -> tuple[Tensor, dist.Work | _Nothing]:
    """The sum over the ranks, of this rank's rows alone with sequence parallelism, once its work is waited for."""
    _, ranks = groups.tensor_parallel()
    if ranks == 1:
        return x, _Nothing()
    if not sequence_parallel:
        return x, dist.all_reduce(x, group=_group(), async_op=True)
    part = x.new_empty(len(x) // ranks, x.shape[1])
    return part, dist.reduce_scatter_tensor(part, x, group=_group(), async_op=True)


def _start_sum_over_copies(grads: Sequence[Tensor], copies: Sequence[int]) -> tuple[list[Tensor], dist.Work | _Nothing]:
    """The sum of each gradient over the neighbouring ranks, so many, that hold the same rows, in fp32 at least, once
    its work is waited for.

    All go in one reduction over all tensor parallel ranks, in which every part has a place of its own. A group of the
    neighbours alone would send less, but be a second communicator in flight beside the first, and the rows are few.
    """
    if not grads:
        return [], _Nothing()
    rank, ranks = groups.tensor_parallel()
    sizes = [grad.numel() * (ranks // count) for grad, count in zip(grads, copies, strict=True)]
    whole = grads[0].new_zeros(sum(sizes), dtype=torch.promote_types(grads[0].dtype, torch.float32))
    sums = []
    for places, grad, count in zip(whole.split(sizes), grads, copies, strict=True):
        sums.append(places.view(-1, *grad.shape)[rank // count].copy_(grad))
    return sums, dist.all_reduce(whole, group=_group(), async_op=True)


def _group() -> dist.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


class VocabEmbedding(VocabParallelEmbedding):
    """Token ids `[tokens]` → `[tokens, 1, hidden]`, the table `[vocab, hidden]` split over its rows."""

    def __init__(self, vocab_size: int, hidden_size: int, initializer: Initializer, config: ModelParallelConfig):
        super().__init__(
            vocab_size,
            hidden_size,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        attach_spec(self.weight, ParameterSpec((vocab_size, hidden_size), 0, initializer, True))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = super().forward(tokens[None])
        return hidden if self.reduce_scatter_embeddings else hidden.transpose(0, 1)


def vocabulary_argmax(logits: Tensor) -> Tensor:
    """`[rows, vocabulary of this rank]` → the token with the largest logit of the whole vocabulary, int64 `[rows]`; of
    equal ones the first."""
    rank, _ = groups.tensor_parallel()
    peak, token = logits.max(-1)
    peaks, tokens = (groups.gather_tensor_parallel(x[None], 0) for x in (peak, token + rank * logits.shape[1]))
    return tokens.gather(0, peaks.argmax(0, keepdim=True))[0]
