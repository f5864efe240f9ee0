"""Where the gated delta rule's row of tokens is one of several, of which others hold those before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Border(NamedTuple):
    """Whose sequences are whose: rows are numbered in the order of their tokens, and every holder of one takes part.

    What a sequence in a row does to the memory is an affine map of a head, S -> M S + B. Its holder gives it to all
    others, and each finds the memory before its own first token from the maps of the rows before; backward likewise
    from those behind.

    Attributes:
        number: of this row.
        first: of the row in which the first sequence of this one begins.
        last: of that in which its last one ends.
        gather: a tensor -> `[rows, …]`, what every holder has given in its place.
    """

    number: int
    first: int
    last: int
    gather: Callable[[Tensor], Tensor]
