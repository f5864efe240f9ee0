"""What a recall task is: a generator of token sequences with answers in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megahybrid.key import key
from megahybrid.tasks.draws import Draws

if TYPE_CHECKING:
    from megahybrid.data.tokenizer import Tokenizer


class Span(NamedTuple):
    """The tokens `[begin, end)` of a sample."""

    begin: int
    end: int


class Answer(NamedTuple):
    """One answer that a sample asks for.

    Attributes:
        span: where its tokens stand; those before it are what it is predicted from.
        needles: where the context holds it, for each place the value's own tokens.
        text: the string that a generated text must contain; empty in tasks of bare tokens.
    """

    span: Span
    needles: tuple[Span, ...]
    text: str = ""

    @property
    def distance(self) -> float:
        """Tokens from the nearest needle to the answer: the query of each of its tokens has the needle's in a window
        of so many keys, its own included. NaN, neither near nor far, where no place holds the answer."""
        return min((self.span.begin - needle.begin for needle in self.needles), default=math.nan)


class TokenAnswers(Sequence[Answer]):
    """Answers of one token with one needle of one token each, made when they are looked at: training needs the places
    only, and making hundreds of objects takes longer than drawing a sample."""

    def __init__(self, places: NDArray[np.int64], needles: NDArray[np.int64]):
        """`places`, `needles`: `[answers]`, where each answer's token and its needle's stand; places ascend."""
        self.places, self._needles = places, needles

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place, needle = int(self.places[index]), int(self._needles[index])
        return Answer(Span(place, place + 1), (Span(needle, needle + 1),))


@dataclass(frozen=True)
class Sample:
    """A context with questions and their right answers.

    Attributes:
        tokens: int64 `[n]`, from the document token on: the prompt, and what a perfect model would write.
        prompt: tokens of the prompt; a model that generates gets tokens[:prompt], and the first answer begins there or
            later.
        answers: in the order of their places.
        facts: what a result says of the sample, such as its haystack, by name; JSON values.
    """

    tokens: NDArray[np.int64]
    prompt: int
    answers: Sequence[Answer]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> NDArray[np.int64]:
        """Where the answers' tokens stand: int64, ascending."""
        if isinstance(self.answers, TokenAnswers):
            return self.answers.places
        return np.concatenate([np.arange(*answer.span) for answer in self.answers])

    def weights(self, parameters: TaskParameters) -> NDArray[np.float32]:
        """Weight in the loss of predicting each token: fp32 `[n]`; that of tokens[i] is the label of place i - 1."""
        weights = np.full(len(self.tokens), parameters.context_weight, np.float32)
        weights[self.asked] = parameters.answer_weight
        return weights


class Vocabulary(NamedTuple):
    """What tokens there are.

    Attributes:
        size: ids are below it.
        document_id: the token that begins every sample, and stands nowhere else in it.
        tokenizer: of text; None where a model knows bare tokens only.
    """

    size: int
    document_id: int
    tokenizer: Tokenizer | None = None


@dataclass
class TaskParameters:
    """Parameters that all tasks have."""

    length: int | None = key(None)
    """Tokens of a sample, answers included: of bare tokens as many, of text at most; the row's when left out."""
    answer_weight: float = key(1.0, at_least=0)
    """Weight in the loss of a token of an answer."""
    context_weight: float = key(0.0, at_least=0)
    """Weight in the loss of every other token."""


class Task(ABC):
    """A generator of samples. Importing it must not import torch.

    Attributes:
        name: in recipes, commands and file names.
        version: raised when its samples change: samples of another version are other data.
        parameters: dataclass of its parameters, with fields made by `megahybrid.key.key`.
        text: whether its samples are text, so that it needs a tokenizer.
        generated: tokens that a model may write after the prompt, part of the length; 0 where it writes as many as the
            sample has there.
        has_depth: whether one can say where in the context its needle stands.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    parameters: ClassVar[type[TaskParameters]] = TaskParameters
    text: ClassVar[bool] = False
    generated: ClassVar[int] = 0
    has_depth: ClassVar[bool] = False

    def check(self, parameters: Any, length: int, vocabulary: Vocabulary) -> None:  # noqa: B027
        """Raise UserError, in one sentence, for what cannot be made: a length too short for what it shall hold, too few
        tokens in the vocabulary, a tokenizer that cannot write a needle."""

    def identity(self, parameters: Any) -> dict[str, Any]:
        """What decides its samples beside the length, the vocabulary and the draws: JSON values."""
        return {"task": self.name, "version": self.version, **asdict(parameters)}

    @abstractmethod
    def sample(
        self, parameters: Any, length: int, vocabulary: Vocabulary, draws: Draws, depth: float | None = None
    ) -> Sample:
        """The sample that the draws determine.

        Args:
            parameters: of this task's class, checked.
            length: tokens, as `TaskParameters.length`.
            vocabulary: the model's.
            draws: the only source of chance.
            depth: where in the context the needle stands, from 0, its beginning, to 1; drawn when left out. Where
                `has_depth` is false, needles are spread over the context whatever it is.
        """

    def samples(self, parameters: Any, length: int, vocabulary: Vocabulary, draws: Sequence[Draws]) -> Iterable[Sample]:
        """The samples that each of the draws, of which nothing was drawn yet, determines; see `sample`."""
        return (self.sample(parameters, length, vocabulary, each) for each in draws)
