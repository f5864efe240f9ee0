"""How the output layer with its loss is judged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megahybrid_kernels.judging.case import Case, Inputs, Lengths, Shape, normal, packed


@dataclass(frozen=True)
class LinearCrossEntropy(Shape):
    """Of a vocabulary, or a rank's part of it."""

    hidden: int
    vocabulary: int

    def cases(self, lengths: Lengths) -> list[Case]:
        """Over whole documents."""
        flat, vocabulary = (sum(lengths), self.hidden), self.vocabulary

        def labelled(dtype: torch.dtype, generator: torch.Generator) -> Inputs:
            inputs = normal(dtype, generator, x=flat, weight=(vocabulary, self.hidden))
            labels = torch.randint(vocabulary, flat[:1], generator=generator)
            weights = torch.rand(flat[:1], generator=generator)
            return inputs | {"weight": inputs["weight"] * self.hidden**-0.5, "labels": labels, "token_weights": weights}

        return [
            Case(
                "linear_cross_entropy",
                "linear_cross_entropy",
                "linear_cross_entropy",
                f"{packed(lengths)} hidden={self.hidden} vocabulary={vocabulary}",
                lengths,
                labelled,
                lambda op, x, sequences: op(*x.values(), z_loss=1e-4)[0],
                constants=("labels", "token_weights"),
                piece="statistics_and_gradient_",
            )
        ]
