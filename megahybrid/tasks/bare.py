"""Recall of bare tokens: keys and their values, and strings. Ids are all they are; no tokenizer knows them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.tasks.draws import Draws, DrawsTogether
from megahybrid.tasks.task import Answer, Sample, Span, Task, TaskParameters, TokenAnswers, Vocabulary

# Samples that are drawn together: of short ones a row holds so many, and most of what one takes are calls of NumPy.
_SEVERAL = 3


class _Pool(NamedTuple):
    """The ids `[begin, end)` without the document token's."""

    begin: int
    end: int
    document_id: int

    @property
    def size(self) -> int:
        return self.end - self.begin - (self.begin <= self.document_id < self.end)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The ids that stand at these places of the pool, each number below `size`."""
        ids = numbers + self.begin
        if self.begin <= self.document_id < self.end:
            ids += ids >= self.document_id
        return ids


@dataclass
class PairParameters(TaskParameters):
    """Parameters of tasks that ask for the value of each of several keys."""

    pairs: int = key(8)
    """Pairs of a key and its value, all keys different; each is asked once."""


@dataclass
class MQARParameters(PairParameters):
    """Parameters of mqar."""

    power: float = key(0.01)
    """The i-th place for a question, counted from 1, is taken with a probability in proportion to i to the power of
    this minus 1: small, questions follow soon."""


class _Pairs(Task):
    """What both tasks of pairs have in common."""

    @abstractmethod
    def _pools(self, vocabulary: Vocabulary) -> dict[str, _Pool]:
        """Where keys, values and fillers come from."""

    @abstractmethod
    def _most(self, length: int) -> int:
        """The pairs that a sample has room for."""

    def check(self, parameters: PairParameters, length: int, vocabulary: Vocabulary) -> None:
        pairs, most = parameters.pairs, self._most(length)
        if pairs > most:
            raise UserError(
                f"{self.name} has room for {max(most, 0)} pairs in {length} tokens, not for {pairs}; lower its pairs "
                "or raise its length."
            )
        pools = self._pools(vocabulary)
        if pools["keys"].size < pairs or min(pool.size for pool in pools.values()) < 1:
            raise UserError(
                f"{self.name} with {pairs} pairs finds only {max(pools['keys'].size, 0)} keys in a vocabulary of "
                f"{vocabulary.size} tokens; raise model.vocab_size or lower its pairs."
            )

    @staticmethod
    def _assemble(
        tokens: NDArray[np.int64], keys: NDArray[np.int64], values: NDArray[np.int64], pairs: Any, questions: Any
    ) -> Sample:
        """Write the pairs and the questions, by the places of their keys in the order of the pairs, over fillers."""
        tokens[pairs], tokens[pairs + 1] = keys, values
        tokens[questions], tokens[questions + 1] = keys, values
        order = np.argsort(questions)
        answers = TokenAnswers(questions[order] + 1, pairs[order] + 1)
        return Sample(tokens, int(answers.places[0]), answers)


class MQAR(_Pairs):
    """Multi-query associative recall (Zoology, arXiv 2312.04927): all pairs, then fillers among which every key occurs
    once more, its value after it. Keys are of [1, V/2), values of [V/2, V), all different. Where Zoology has any
    filler after a question, the answer stands here, and no filler is a key of the sample."""

    name = "mqar"
    parameters = MQARParameters

    def _pools(self, vocabulary: Vocabulary) -> dict[str, _Pool]:
        size, document = vocabulary.size, vocabulary.document_id
        return {"keys": _Pool(1, size // 2, document), "values": _Pool(size // 2, size, document)}

    def _most(self, length: int) -> int:
        return (length - 1) // 4

    def sample(
        self,
        parameters: MQARParameters,
        length: int,
        vocabulary: Vocabulary,
        draws: Draws,
        depth: float | None = None,
    ) -> Sample:
        count, pools = parameters.pairs, self._pools(vocabulary)
        keys = pools["keys"].take(draws.distinct(pools["keys"].size, count))
        values = pools["values"].take(draws.distinct(pools["values"].size, count))
        # Places in the order in which they are drawn without replacement: the race of exponential times.
        room = (length - 1) // 2 - count
        times = -np.log1p(-draws.uniform(room)) / _law(room, parameters.power)
        questions = 1 + 2 * count + 2 * np.argsort(times, kind="stable")[:count]
        taken = np.sort(np.append(keys, vocabulary.document_id))
        tokens = draws.below(vocabulary.size - count - 1, length)
        tokens += np.searchsorted(taken - np.arange(count + 1), tokens, side="right")
        tokens[0] = vocabulary.document_id
        return self._assemble(tokens, keys, values, 1 + 2 * np.arange(count), questions)


@lru_cache
def _law(room: int, power: float) -> NDArray[np.float64]:
    """`[room]`, in proportion to the probability of each place."""
    return np.arange(1, room + 1) ** (power - 1.0)


class SelectiveMQAR(_Pairs):
    """Pairs among fillers in the first half, questions among fillers in the last quarter: what is worth keeping is
    rare, looks different, and is far from where it is asked. Keys are of [1, V/4), fillers of [V/4, V/2), values of
    [V/2, V)."""

    name = "selective_mqar"
    parameters = PairParameters

    def _pools(self, vocabulary: Vocabulary) -> dict[str, _Pool]:
        size, document = vocabulary.size, vocabulary.document_id
        return {
            "keys": _Pool(1, size // 4, document),
            "fillers": _Pool(size // 4, size // 2, document),
            "values": _Pool(size // 2, size, document),
        }

    def _most(self, length: int) -> int:
        return length // 8

    def sample(
        self,
        parameters: PairParameters,
        length: int,
        vocabulary: Vocabulary,
        draws: Draws,
        depth: float | None = None,
    ) -> Sample:
        return self._assemble(*self._parts(parameters, length, vocabulary, draws))

    def samples(
        self, parameters: PairParameters, length: int, vocabulary: Vocabulary, draws: Sequence[Draws]
    ) -> Iterable[Sample]:
        if len(draws) < _SEVERAL:
            return super().samples(parameters, length, vocabulary, draws)
        parts = self._parts(parameters, length, vocabulary, DrawsTogether(draws, 2 * length))
        return map(self._assemble, *parts)

    def _parts(
        self, parameters: PairParameters, length: int, vocabulary: Vocabulary, draws: Draws | DrawsTogether
    ) -> tuple[NDArray[np.int64], ...]:
        """Fillers, keys, values, and the places of pairs and of questions, `[…, n]`."""
        count, pools = parameters.pairs, self._pools(vocabulary)
        tokens = pools["fillers"].take(draws.below(pools["fillers"].size, length))
        tokens[..., 0] = vocabulary.document_id
        keys = pools["keys"].take(draws.distinct(pools["keys"].size, count))
        values = pools["values"].take(draws.below(pools["values"].size, count))
        pairs = 1 + 2 * draws.distinct((length // 2 - 1) // 2, count)
        questions = length - 2 * (length // 8) + 2 * draws.distinct(length // 8, count)
        return tokens, keys, values, pairs, questions


class Copy(Task):
    """A string of random tokens, a separator, and the string again, which is the one answer (Jelassi et al., arXiv
    2402.01032). The separator is the smallest id that is not the document token's, and never in the string."""

    name = "copy"

    def check(self, parameters: TaskParameters, length: int, vocabulary: Vocabulary) -> None:
        if length < 4 or length % 2:
            raise UserError(f"copy needs an even length of 4 tokens or more, not {length}; change its length.")
        if vocabulary.size < 3:
            raise UserError(f"copy needs 3 tokens, the vocabulary has {vocabulary.size}; raise model.vocab_size.")

    def sample(
        self,
        parameters: TaskParameters,
        length: int,
        vocabulary: Vocabulary,
        draws: Draws,
        depth: float | None = None,
    ) -> Sample:
        document = vocabulary.document_id
        separator = int(document == 0)
        string = _Pool(separator + 1, vocabulary.size, document).take(
            draws.below(_Pool(separator + 1, vocabulary.size, document).size, length // 2 - 1)
        )
        tokens = np.concatenate([[document], string, [separator], string])
        prompt = length // 2 + 1
        return Sample(tokens, prompt, (Answer(Span(prompt, length), (Span(1, length // 2),)),))
