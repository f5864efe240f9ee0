"""Texts as other people's benchmarks ask of them: how likely a continuation is, and what the model writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.evaluation.forced import read
from megahybrid.inference.batch import suitable_chunk
from megahybrid.inference.generate import Generator, Options
from megahybrid.inference.sampling import Sampling
from megahybrid.model.stack import Stack
from megahybrid.tasks import Answer, Sample, Span

_MOST_TEXTS, _MOST_TOKENS = 64, 2**20  # in work at once, where nothing else is asked for
_ENCODED = 1024  # texts at once
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Likelihood(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logarithm: natural, of the probability of all its tokens.
        greedy: whether each of them is the likeliest after those before it.
    """

    logarithm: float
    greedy: bool


class Scorer:
    """A model with its tokenizer, asked about texts; each is a document, which begins with the document token.

    Texts may have any length: they are read in pieces on a constant state, and nothing is cut off. Results come with
    the number of their text, the longest texts first: what does not fit into memory fails at once. Used alike on all
    tensor parallel ranks.
    """

    def __init__(
        self, model: Stack, tokenizer: Tokenizer, batch_size: int | None = None, prefill_chunk: int | None = None
    ):
        """`batch_size`, `prefill_chunk`: texts in work at once, tokens read in a step; None for what suits."""
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._prefill_chunk = prefill_chunk or suitable_chunk(model)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        """Of each continuation after its context, which may be empty."""
        # As lm-evaluation-harness splits (TemplateLM._encode_pair): spaces belong to the words behind them, and the
        # continuation's tokens are those that the whole has more than the context.
        contexts = list(map(len, self._encode([context.rstrip() for context, _ in pairs])))
        yield from self._read(list(self._encode([context + continuation for context, continuation in pairs])), contexts)

    def document_likelihoods(self, texts: Sequence[str]) -> Iterator[tuple[int, Likelihood]]:
        """Of each whole text."""
        yield from self._read(list(self._encode(texts)), [0] * len(texts))

    def losses(self, texts: Sequence[str], length: int) -> Iterator[tuple[int, float, int]]:
        """Of pieces of at most `length` tokens, into which texts are cut, each read as a document: the text's number,
        nats, and tokens. Those without tokens come first, before anything is read."""
        pieces = [
            (number, ids[first : first + length])
            for number, ids in enumerate(self._encode(texts))
            for first in range(0, max(1, len(ids)), length)
        ]
        for place, found in self._read([ids for _, ids in pieces], [0] * len(pieces)):
            number, ids = pieces[place]
            yield number, -found.logarithm, len(ids)

    def _encode(self, texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
        """Benchmarks ask for tens of thousands of texts at once, and a list takes five times an array's memory."""
        for first in range(0, len(texts), _ENCODED):
            yield from map(np.array, self._tokenizer.encode_batch(texts[first : first + _ENCODED]))

    def _read(self, texts: Sequence[NDArray[np.int64]], contexts: Sequence[int]) -> Iterator[tuple[int, Likelihood]]:
        """Of the tokens of each text behind its first `contexts` ones, or of its last token where there are none."""
        order = sorted((number for number, ids in enumerate(texts) if len(ids)), key=lambda number: -len(texts[number]))
        yield from ((number, Likelihood(0.0, True)) for number, ids in enumerate(texts) if not len(ids))
        first = 0
        while first < len(order):
            numbers = order[first : first + self._at_once(len(texts[order[first]]))]
            samples = [self._sample(texts[number], contexts[number]) for number in numbers]
            readings = read(self._model, samples, self._tokenizer.vocab_size, self._prefill_chunk)
            for number, sample, reading in zip(numbers, samples, readings, strict=True):
                greedy = (reading.found[sample.asked] == sample.tokens[sample.asked]).all()
                yield number, Likelihood(-float(reading.nll[sample.asked].sum()), bool(greedy))
            first += len(numbers)

    def _sample(self, ids: NDArray[np.int64], context: int) -> Sample:
        tokens = np.array([self._tokenizer.document_id, *ids])
        # A tokenizer may join the continuation with the context's last token: then that stands for it.
        begin = min(context + 1, len(ids))
        return Sample(tokens, begin, [Answer(Span(begin, len(tokens)), ())])

    def generate(self, requests: Sequence[tuple[str, Options]]) -> Iterator[tuple[int, str]]:
        """What the model writes behind each text; the sizes in the options are this scorer's.

        One that is asked for several times is sampled with another seed each time.
        """
        times, alike = Counter(), {}
        for number, request in enumerate(requests):
            alike.setdefault((request[1], times[request]), []).append(number)
            times[request] += 1
        for (options, time), numbers in alike.items():
            numbers.sort(key=lambda number: -len(requests[number][0]))
            prompts = [requests[number][0] for number in numbers]
            sized = replace(
                options,
                sampling=replace(options.sampling, seed=options.sampling.seed + time),
                batch_size=self._at_once(len(prompts[0])),
                prefill_chunk=self._prefill_chunk,
            )
            texts = [""] * len(prompts)
            for piece in Generator(self._model, self._tokenizer).generate(prompts, sized):
                texts[piece.prompt] += piece.text
                if piece.finish:
                    yield numbers[piece.prompt], texts[piece.prompt]

    def _at_once(self, longest: int) -> int:
        """Texts in work together, of which the longest has so many tokens."""
        return self._batch_size or max(1, min(_MOST_TEXTS, _MOST_TOKENS // max(longest, 1)))


def options(asked: Mapping[str, Any]) -> Options:
    """What generation_kwargs mean: greedy, unless there is a temperature above 0 and no `do_sample: false`.

    Raises UserError for what is not done here.
    """
    rest = dict(asked)
    until = rest.pop("until", None) or []
    limits = [rest.pop(name) for name in _LIMITS if rest.get(name) is not None]
    temperature = float(rest.pop("temperature", None) or 0)
    if rest.pop("do_sample", None) is False:
        temperature = 0.0
    sampling = Sampling(
        temperature,
        int(rest.pop("top_k", None) or 0),
        float(rest.pop("top_p", None) or 1),
        float(rest.pop("repetition_penalty", None) or 1),
    )
    rest = {name: value for name, value in rest.items() if value is not None and (name, value) != ("num_beams", 1)}
    if rest:
        raise UserError(
            f"A task asks to generate with {', '.join(map(repr, rest))}, which is not done here; remove it from the "
            "task's generation_kwargs."
        )
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return Options(int(limits[0]) if limits else 256, stop, sampling)
