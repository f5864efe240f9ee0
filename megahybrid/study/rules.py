"""Rules for the learning rate and the batch of a run, by name.

N is the number of parameters without embeddings, D that of tokens. All are of dense transformers: that they hold for
other mixers and sizes is a hope, which `rules.tune` checks. On Step Law's public grid the best loss is missed by 0.10 %
on average and 0.31 % at most with step_law, 0.53 % and 1.1 % with olmo_core. A rate twice too high costs 1.1 %, half of
it 0.35 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Subject(NamedTuple):
    """The model that a rule is asked about.

    Attributes:
        parameters: without embeddings.
        learning_rate: the base recipe's.
        batch: tokens of the base recipe's batch.
    """

    parameters: int
    learning_rate: float
    batch: int


class Rule(NamedTuple):
    """A rule.

    Attributes:
        value: the peak learning rate, or the tokens of a batch, of a model trained on so many tokens.
        source: where it comes from.
        sizes: parameters of the smallest and of the largest model there, if it comes from models.
    """

    value: Callable[[Subject, float], float]
    source: str
    sizes: tuple[float, float] = (0, math.inf)

    def is_far(self, parameters: int) -> bool:
        """Whether a model has less than half or more than twice the parameters of any there."""
        return not self.sizes[0] / 2 <= parameters <= self.sizes[1] * 2


_STEP_LAW = "Li et al., Step Law, arXiv 2503.04715", (60e6, 1e9)
_OLMO = "OLMo-core's model ladder, after Porian et al., arXiv 2406.19146", (5e6, 901e6)
_FIXED = Rule(lambda subject, tokens: subject.learning_rate, "the base recipe's optimizer.learning_rate")

LEARNING_RATES: Mapping[str, Rule] = {
    "step_law": Rule(lambda subject, tokens: 1.79 * subject.parameters**-0.713 * tokens**0.307, *_STEP_LAW),
    "olmo_core": Rule(
        # Half of what that paper found for cosine, since wsd stays at its peak.
        lambda subject, tokens: 0.0047 / 2 * (subject.parameters / 108e6) ** (-1 / 3),
        *_OLMO,
    ),
    "fixed": _FIXED,
}
"""Of the peak learning rate."""

BATCHES: Mapping[str, Rule] = {
    "step_law": Rule(lambda subject, tokens: 0.58 * tokens**0.571, *_STEP_LAW),
    "olmo_core": Rule(lambda subject, tokens: 2048 * 160 * (subject.parameters / 108e6) ** (2 / 3), *_OLMO),
    "fixed": Rule(lambda subject, tokens: subject.batch, "the base recipe's train.global_batch_size"),
}
"""Of the batch in tokens."""
