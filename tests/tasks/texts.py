"""Small tokenizers, and prose to hide needles in."""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megahybrid.data.tokenizer import Tokenizer

# Words, sentences that end in different ways, digits, letters beyond ASCII.
_WORDS = ("the", "of", "grass", "is", "a", "river", "under", "old", "bridge", "Nobody", "42", "naïve", "snow-white")
_ENDS = [".", ".", "?", "!", '."', ".)", ","]

# The splitting of cl100k and of those after it: a full stop takes the line's end with it, digits go by threes.
_THREES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def prose_text(words: int, seed: int = 0) -> str:
    """Text of this many words, in lines."""
    random = np.random.default_rng(seed)
    text = [str(each) for each in random.choice(_WORDS, words)]
    for place in np.flatnonzero(random.random(words) < 0.15):
        text[place] += random.choice(_ENDS)
    return "\n".join(" ".join(text[at : at + 11]) for at in range(0, words, 11))


_CORPUS = [
    prose_text(2000, seed=1),
    "A special magic number is hidden within the following text. One of the special magic numbers for odd-hat is: 7.",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n" * 3,
    "    for each:\n        if it:\n" * 20,
    "What are all the special magic uuids mentioned in the provided text? Question: Find all variables VAR ABC = 5",
] * 2


def byte_level() -> Tokenizer:
    """As our own."""
    return Tokenizer.train(_CORPUS, 700)


def bytes_alone() -> Tokenizer:
    """A token a byte, but for few."""
    return Tokenizer.train(["a"], 257)


def threes() -> Tokenizer:
    """As tokenizers are today."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_THREES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, "<|endoftext|>", 900, pre_tokenizers.ByteLevel.alphabet())


def sentence_pieces() -> Tokenizer:
    """As Llama 2's: a space before all, and texts are not split, but no token reaches over a space."""
    return _sentence_pieces(pre_tokenizers.Metaspace())


def over_spaces() -> Tokenizer:
    """The same, with tokens that reach over spaces."""
    return _sentence_pieces(None)


def _sentence_pieces(split) -> Tokenizer:
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if split is None:
        backend.normalizer = normalizer
    else:
        backend.pre_tokenizer = split
    letters = {chr(each) for each in range(33, 127)} | {"\n", "▁", "é", "ï"}
    made = _trained(backend, "<s>", 500, letters, extra=["<unk>"], max_token_length=12)
    backend.normalizer, backend.pre_tokenizer = normalizer, None
    return made


def lower_case() -> Tokenizer:
    """Cannot write a capital letter."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, "<s>", 400, pre_tokenizers.ByteLevel.alphabet())


def few_letters() -> Tokenizer:
    """Has no digits."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    letters = [chr(each) for each in range(33, 127) if not chr(each).isdigit()]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "<unk>"], initial_alphabet=letters)
    backend.train_from_iterator(["the grass is green"], trainer)
    return Tokenizer(backend)


def _trained(backend: Backend, document: str, size: int, alphabet, extra=(), **more) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[document, *extra],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
        **more,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return Tokenizer(backend)


FAITHFUL = {each.__name__: each for each in (byte_level, bytes_alone, threes, sentence_pieces)}
