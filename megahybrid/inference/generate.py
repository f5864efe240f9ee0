"""Text from a checkpoint: prompts are read in pieces and continued together, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.inference.batch import Batch, suitable_chunk
from megahybrid.inference.sampling import Sampling, penalise
from megahybrid.inference.text import StopFilter, TextStream
from megahybrid.model.stack import Stack
from megahybrid_kernels.precision import at_least_fp32


@dataclass(frozen=True)
class Options:
    """What to generate and in what portions. Raises UserError for a value out of range.

    Attributes:
        tokens: the most tokens a text gets.
        stop: strings before which a text ends.
        sampling: how tokens are chosen.
        batch_size: prompts in work at once; the next one begins when one is done.
        prefill_chunk: tokens of prompts that are read in one step; None for as many as suit the device.
    """

    tokens: int = 128
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    prefill_chunk: int | None = None

    def __post_init__(self):
        for name in ("tokens", "batch_size", "prefill_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
        if "" in self.stop:
            raise UserError("--stop is empty; give the text before which generation should end.")


class Piece(NamedTuple):
    """A piece of a prompt's text.

    Attributes:
        prompt: number of the prompt.
        text: what to append to its text.
        finish: None as long as more may come; "document" when the model ended it, "stop", or "length".
    """

    prompt: int
    text: str
    finish: str | None


class Generator:
    """A model with its tokenizer, ready to continue prompts. Used alike on all tensor parallel ranks."""

    def __init__(self, model: Stack, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def generate(self, prompts: Sequence[str], options: Options) -> Iterator[Piece]:
        """Pieces of every prompt's text as they come, those of several prompts mixed; each ends with a `finish`.

        A prompt's text depends on the prompt, the options and the seed, not on the prompts beside it (but for rounding,
        which depends on the shapes of a step).
        """
        encoded = [[self.tokenizer.document_id, *ids] for ids in self.tokenizer.encode_batch(prompts)]
        coming = iter([_Text(number, ids, self.tokenizer, options) for number, ids in enumerate(encoded)])
        batch, texts = Batch(self.model, options.prefill_chunk or suitable_chunk(self.model)), []
        while True:
            new = list(islice(coming, options.batch_size - len(texts)))
            if new:
                batch.add([text.prompt for text in new])
                texts += new
            if not texts:
                return
            rows, logits = batch.step()
            for row, token in zip(rows, self._choose([texts[row] for row in rows], logits, options), strict=True):
                batch.extend(row, token)
                piece = texts[row].push(token)
                if piece.text or piece.finish:
                    yield piece
            running = [row for row, text in enumerate(texts) if not text.done]
            batch.keep(running)
            texts = [texts[row] for row in running]

    @torch.inference_mode()
    def _choose(self, texts: list[_Text], logits: Tensor | None, options: Options) -> list[int]:
        if logits is None:
            return []
        logits = at_least_fp32(logits[:, : self.tokenizer.vocab_size])  # the rest of the embedding is never trained
        sampling = options.sampling
        if sampling.repetition_penalty != 1:
            present = torch.stack([text.present for text in texts]).to(logits.device)
            logits = penalise(logits, present, sampling.repetition_penalty)
        draws = torch.stack([text.draw() for text in texts])
        return sampling.choose(logits, draws.to(logits.device)).tolist()


class _Text:
    """A prompt and what is known of its text so far."""

    def __init__(self, number: int, prompt: list[int], tokenizer: Tokenizer, options: Options):
        self.number, self.prompt, self.done = number, prompt, False
        self._left, self._document = options.tokens, tokenizer.document_id
        self._random = torch.Generator().manual_seed(options.sampling.seed)
        self._stream, self._filter = TextStream(tokenizer), StopFilter(options.stop)
        # Without the document token: it begins every prompt, and penalising it would forbid texts to end.
        self.present = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        self.present[prompt[1:]] = True

    def draw(self) -> Tensor:
        """The next random number of [0, 1), float64; its place in the sequence is that of the token it chooses."""
        return torch.rand((), dtype=torch.float64, generator=self._random)

    def push(self, token: int) -> Piece:
        """The piece of text that a chosen token brings."""
        if token == self._document:
            return self._finish("document", self._stream.finish())
        self.present[token] = True
        self._left -= 1
        text, stopped = self._filter.push(self._stream.push(token))
        if stopped:
            self.done = True
            return Piece(self.number, text, "stop")
        if self._left == 0:
            return self._finish("length", self._stream.finish(), text)
        return Piece(self.number, text, None)

    def _finish(self, reason: str, rest: str, text: str = "") -> Piece:
        self.done = True
        last, stopped = self._filter.push(rest)
        if stopped:
            return Piece(self.number, text + last, "stop")
        return Piece(self.number, text + last + self._filter.finish(), reason)
