"""Answers as a model writes them: greedily, on inference's prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megahybrid.inference.batch import Batch
from megahybrid.model.stack import Stack
from megahybrid.tasks import Sample, Vocabulary
from megahybrid_kernels.precision import at_least_fp32


def continuations(
    model: Stack, prompts: Sequence[Sequence[int]], most: int, vocabulary: Vocabulary, prefill_chunk: int
) -> list[list[int]]:
    """What the model writes behind each prompt, up to the document token or `most` tokens."""
    batch, written, rows = Batch(model, prefill_chunk), [[] for _ in prompts], list(range(len(prompts)))
    batch.add(prompts)
    while rows:
        done, logits = batch.step()
        ended = set()
        for row, token in zip(done, _likeliest(logits, vocabulary), strict=True):
            text = written[rows[row]]
            if token != vocabulary.document_id:
                text.append(token)
            if token == vocabulary.document_id or len(text) == most:
                ended.add(row)
            else:
                batch.extend(row, token)
        staying = [row for row in range(batch.count) if row not in ended]
        batch.keep(staying)
        rows = [rows[row] for row in staying]
    return written


@dataclass
class _Row:
    """A sequence of the batch that comes to an answer of a sample, or writes one."""

    sample: int
    answer: int
    written: list[int] = field(default_factory=list)


def answers_one_by_one(
    model: Stack, samples: Sequence[Sample], vocabulary: Vocabulary, prefill_chunk: int
) -> list[list[list[int]]]:
    """What the model writes in the place of each answer of each sample, all before it being as in the sample.

    Where an answer has several tokens, a copy of the sequence writes them, while the sequence goes on to the next.
    """
    spans = [[answer.span for answer in sample.answers] for sample in samples]
    found: list[list[list[int]]] = [[[] for _ in each] for each in spans]
    batch, rows = Batch(model, prefill_chunk), [_Row(number, 0) for number in range(len(samples))]
    batch.add([sample.tokens[: of[0].begin].tolist() for sample, of in zip(samples, spans, strict=True)])
    while rows:
        done, logits = batch.step()
        chosen = dict(zip(done, _likeliest(logits, vocabulary), strict=True))
        going: list[tuple[int, _Row, list[int]]] = []  # the row that a next one continues, and its next tokens
        for number, row in enumerate(rows):
            if number not in chosen:
                going.append((number, row, []))
                continue
            token, own = chosen[number], spans[row.sample]
            span, first = own[row.answer], not row.written
            written = [*row.written, token]
            if len(written) < span.end - span.begin:
                going.append((number, _Row(row.sample, row.answer, written), [token]))
            else:
                found[row.sample][row.answer] = written
            if first and row.answer + 1 < len(own):
                forced = samples[row.sample].tokens[span.begin : own[row.answer + 1].begin].tolist()
                going.append((number, _Row(row.sample, row.answer + 1), forced))
        batch.keep([source for source, _, _ in going])
        rows = [row for _, row, _ in going]
        for number, (_, _, tokens) in enumerate(going):
            for token in tokens:
                batch.extend(number, token)
    return found


def _likeliest(logits: Tensor | None, vocabulary: Vocabulary) -> list[int]:
    """Rows of the embedding beyond the vocabulary are never trained."""
    return [] if logits is None else at_least_fp32(logits[:, : vocabulary.size]).argmax(1).tolist()
