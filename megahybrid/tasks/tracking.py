"""RULER's variable tracking (arXiv 2404.06654; NVIDIA/RULER `variable_tracking.py`): its text to the letter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from megahybrid.key import key
from megahybrid.tasks.draws import Draws
from megahybrid.tasks.encoding import word_tokens
from megahybrid.tasks.haystack import NOISE
from megahybrid.tasks.task import TaskParameters, Vocabulary
from megahybrid.tasks.text import Draft, TextTask

if TYPE_CHECKING:
    from megahybrid.data.tokenizer import Tokenizer

# "assgined" is RULER's.
TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {num_v} variables are assgined the value {query}, they are: "
)

# Of the solved example: letters of a name, most tokens, and the step in which its noise grows.
_EXAMPLE_LETTERS, _EXAMPLE_TOKENS, _EXAMPLE_STEP = 3, 500, 5


@dataclass
class TrackingParameters(TaskParameters):
    """Parameters of vt."""

    hops: int = key(4)
    """Assignments of a variable to a variable, after the one of the value; one more variables are asked."""
    example: bool = key(True)
    """Whether a solved example of up to 500 tokens comes first, as in RULER; a short length has no room for it."""


class VariableTracking(TextTask):
    """A chain of assignments among noise; asked are all variables that have the value of its first."""

    name = "vt"
    parameters = TrackingParameters
    generated = 30

    def draft(
        self, parameters: TrackingParameters, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None
    ) -> Draft:
        names, text = _chain(draws, parameters.hops, letters=5)
        before = ""
        if parameters.example:
            example_names, example = _chain(draws, parameters.hops, _EXAMPLE_LETTERS)
            units = _example_units(vocabulary.tokenizer, parameters.hops)
            before = f"{example(units)} {' '.join(example_names)}\n\n\n\n"
        # The prompt ends without the template's space: a model writes it with the first answer.
        return Draft(
            lambda units: before + text(units).rstrip(), names, _fewest(parameters.hops), length, {"haystack": "noise"}
        )


def _chain(draws: Draws, hops: int, letters: int) -> tuple[list[str], Callable[[int], str]]:
    """The variables of a chain, and its text by the number of its lines of noise."""
    names = [_name(number, letters) for number in draws.distinct(26**letters, hops + 1).tolist()]
    value, seed = str(10_000 + int(draws.below(89_999, 1)[0])), int(draws.below(1 << 53, 1)[0])
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]

    def text(units: int) -> str:
        lines = [NOISE + "\n"] * units
        for number, place in enumerate(sorted(Draws(seed, units).distinct(units, hops + 1).tolist())):
            lines.insert(place + number, chain[number])
        return TEMPLATE.format(context=" ".join(lines), query=value, num_v=hops + 1)

    return names, text


def _name(number: int, letters: int) -> str:
    return "".join(chr(ord("A") + number // 26**place % 26) for place in range(letters))


def _fewest(hops: int) -> int:
    """Lines of noise: with no more of them than assignments RULER takes its lines apart."""
    return hops + 2


@lru_cache
def _example_units(tokenizer: Tokenizer, hops: int) -> int:
    """Lines of noise of the solved example: as many, in RULER's steps, as its tokens and those of an answer allow."""
    names, text = _chain(Draws("example"), hops, _EXAMPLE_LETTERS)
    fewest = units = -(-_fewest(hops) // _EXAMPLE_STEP) * _EXAMPLE_STEP
    while True:
        tokens = word_tokens(tokenizer).count(f"{text(units)} {' '.join(names)}")
        if tokens + VariableTracking.generated > _EXAMPLE_TOKENS:
            return max(units - _EXAMPLE_STEP, fewest)
        units += _EXAMPLE_STEP
