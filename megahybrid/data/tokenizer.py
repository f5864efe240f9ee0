"""The tokenizer: trained byte-level BPE, or any given tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megahybrid.errors import UserError
from megahybrid.files import write_text

END_OF_TEXT = "<|endoftext|>"

# Of tokenizers that are not in the one-file format.
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")

# What published tokenizers call the token between documents, most specific first.
_DOCUMENT_TOKENS = (
    END_OF_TEXT,
    "<|begin_of_text|>",
    "<|begin▁of▁sentence|>",
    "<bos>",
    "<s>",
    "<|end_of_text|>",
    "<eos>",
    "</s>",
)

_SMALLEST_VOCABULARY = len(pre_tokenizers.ByteLevel.alphabet()) + 1


class Tokenizer:
    """Text to token ids and back. Special tokens written out inside a text are ordinary text."""

    def __init__(self, backend: Backend, origin: str = "the tokenizer"):
        """`origin` names it in messages. Raises UserError if it has no token to begin documents with."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend, self._origin = backend, origin
        self.document_token = next((name for name in _DOCUMENT_TOKENS if backend.token_to_id(name) is not None), "")
        """The token that begins every document."""
        if not self.document_token:
            raise UserError(
                f"{origin} has none of the tokens that can begin a document ({', '.join(_DOCUMENT_TOKENS)}); "
                "add one as a special token."
            )
        self.document_id: int = backend.token_to_id(self.document_token)
        """Its id."""
        if self.document_id in self.encode_batch([self.document_token])[0]:
            raise UserError(
                f"{origin} does not mark {self.document_token} as a special token, so text that contains it "
                "would look like a new document; mark it special."
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with at most `vocab_size` tokens, `<|endoftext|>` among them.

        Raises UserError if `vocab_size` cannot hold the bytes.
        """
        if vocab_size < _SMALLEST_VOCABULARY:
            raise UserError(
                f"model.vocab_size is {vocab_size}; a byte-level tokenizer needs at least {_SMALLEST_VOCABULARY}."
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises UserError if it is missing or unreadable."""
        file = tokenizer_file(path)
        try:
            backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a bare Exception for malformed files
            raise UserError(f"'{file}' is not a readable tokenizer.json: {_first_line(error)}.") from error
        return cls(backend, f"'{file}'")

    def save(self, path: Path) -> None:
        """Write tokenizer.json, atomically."""
        write_text(path, self.to_json())

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._backend.to_str(pretty=True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def of_numbers(self) -> bool:
        """Whether its text is numbers (number_tokenizer.py): the model that it belongs to knows bare tokens only."""
        return isinstance(self._backend.model, models.WordLevel)

    def id_of(self, token: str) -> int:
        """Raises UserError for a token that it lacks."""
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"{self._origin} lacks the token {token} that tokenizer_config.json names; correct either.")
        return found

    def require_fit(self, vocab_size: int) -> None:
        """Raises UserError if the embedding, of `vocab_size` rows, lacks a row for some token."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"The tokenizer has {self.vocab_size} tokens, more than model.vocab_size ({vocab_size}); "
                f"raise model.vocab_size to at least {self.vocab_size}."
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without a document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without document tokens; uses all cores."""
        try:
            return [item.ids for item in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library's own, of a tokenizer without a token for what it does not know
            known = f"knows the numbers from 1 to {self.vocab_size - 1}, with spaces between them"
            fault = known if self.of_numbers else f"cannot write this text: {_first_line(error)}"
            raise UserError(f"{self._origin} {fault}.") from error

    def encode_spans(self, text: str, ranges: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, without a document token, and for each range of its characters, given by its begin and
        end, the begin and end of the tokens that hold them."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        # A character may have no token of its own: one that the tokenizer drops, or a space between words.
        spans = []
        for begin, end in ranges:
            held = [token for token in map(encoding.char_to_token, range(begin, end)) if token is not None]
            spans.append((held[0], held[-1] + 1) if held else (len(encoding), len(encoding)))
        return encoding.ids, spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that `path` names or holds. Raises UserError if there is none."""
    file = Path(path).expanduser()
    folder = file if file.is_dir() else file.parent
    if file.is_dir():
        file = file / "tokenizer.json"
    slow = [name for name in _SLOW_FILES if (folder / name).is_file()]
    if slow and (not file.is_file() or file.name in _SLOW_FILES):
        raise UserError(
            f"'{folder}' has {' and '.join(slow)} but no tokenizer.json; make one with transformers: "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')."
        )
    if not file.is_file():
        raise UserError(
            f"There is no tokenizer '{file}'; put one there (`hf download NAME tokenizer.json --local-dir DIR`) or, "
            "where data.tokenizer names it, correct or remove that."
        )
    return file


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer, in whatever format."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_SLOW_FILES))


def tokenizer_hash(file: Path) -> str:
    """sha256 of a tokenizer.json. Raises UserError if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
