"""The ops around the mixers: norms, SwiGLU and the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from megahybrid.doctor.cases.case import Case, Inputs, Op, Size, normal, normals
from megahybrid_kernels import Sequences


def cases(size: Size) -> list[Case]:
    """Over whole sequences."""
    flat, inner = (size.tokens, size.hidden), (size.tokens, size.intermediate)
    hidden, vocabulary = f"{size.packed} hidden={size.hidden}", size.vocabulary or size.intermediate

    def add(op: Op, x: Inputs, sequences: Sequences) -> Tensor:
        return torch.cat(op(*x.values(), 1e-6))

    def labelled(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
        inputs = normal(dtype, generator, x=flat, weight=(vocabulary, size.hidden))
        labels = torch.randint(vocabulary, flat[:1], generator=generator)
        weights = torch.rand(flat[:1], generator=generator)
        return inputs | {"weight": inputs["weight"] * size.hidden**-0.5, "labels": labels, "token_weights": weights}

    norm, summed = normals(x=flat, weight=flat[1:]), normals(x=flat, residual=flat, weight=flat[1:])
    return [
        Case("rms_norm", "norm", "rms_norm", hidden, size.sequences, norm, lambda op, x, _: op(*x.values(), 1e-6)),
        Case("add_rms_norm", "norm", "add_rms_norm", hidden, size.sequences, summed, add),
        Case(
            "swiglu",
            "swiglu",
            "swiglu",
            f"{size.packed} intermediate={size.intermediate}",
            size.sequences,
            normals(gate=inner, up=inner),
            lambda op, x, sequences: op(x["gate"], x["up"]),
        ),
        Case(
            "linear_cross_entropy",
            "linear_cross_entropy",
            "linear_cross_entropy",
            f"{hidden} vocabulary={vocabulary}",
            size.sequences,
            labelled,
            lambda op, x, sequences: op(*x.values(), z_loss=1e-4)[0],
            constants=("labels", "token_weights"),
            piece="statistics_and_gradient_",
        ),
    ]


def more_cases(size: Size) -> list[Case]:
    """None: these ops know no sequences."""
    return []
