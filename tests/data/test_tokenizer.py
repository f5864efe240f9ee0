"""The tokenizer keeps text as it is and documents apart."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from megahybrid.data import Tokenizer
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import make_config, silent, write_texts

HARD = ["<|endoftext|>", " a <|endoftext|><|endoftext|>b", "\r\n\t  x", "é你🙂", "\x00", "", "﻿bom"]


def given(path, special=("<s>",), mark=True, words=()):
    """A byte-level tokenizer.json with begin-of-text added by its post-processor, truncation and padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if mark:
        backend.add_special_tokens(list(special))
    else:
        backend.add_tokens(list(special))
    backend.add_tokens(list(words))
    if special:
        first = special[0]
        backend.post_processor = TemplateProcessing(f"{first} $A", special_tokens=[(first, backend.token_to_id(first))])
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(path))
    return path


def test_a_trained_tokenizer_round_trips_everything(tmp_path):
    trained = Tokenizer.train(["the text <|endoftext|> of the text"] * 10, 300)
    trained.save(tmp_path / "t" / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.load(tmp_path / "t"), Tokenizer.load(tmp_path / "t" / "tokenizer.json")):
        encoded = tokenizer.encode_batch(HARD)
        assert [tokenizer.decode(ids) for ids in encoded] == HARD
        assert all(tokenizer.document_id not in ids for ids in encoded)
        assert tokenizer.document_token == "<|endoftext|>"
        assert 257 < tokenizer.vocab_size <= 300
        assert tokenizer.decode([tokenizer.document_id]) == "<|endoftext|>"
        assert tokenizer.decode([tokenizer.document_id], skip_special_tokens=True) == ""


def test_training_is_deterministic():
    texts = [f"word{i % 7} of{i % 5} text{i % 3}" for i in range(500)]
    vocabularies = [Tokenizer.train(texts, 320)._backend.to_str() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]


def test_a_given_tokenizer_adds_cuts_and_pads_nothing(tmp_path):
    tokenizer = Tokenizer.load(given(tmp_path / "tokenizer.json"))
    text = "<s> a long text, longer than three tokens"
    assert tokenizer.document_id == 256
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("</s>", "<s>"), "<s>"), (("<s>", "<|endoftext|>"), "<|endoftext|>"), (("x", "</s>"), "</s>")],
)
def test_the_document_token_is_a_known_one(tmp_path, names, expected):
    assert Tokenizer.load(given(tmp_path / "tokenizer.json", names)).document_token == expected


def test_unfit_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match="has none of the tokens"):
        Tokenizer.load(given(tmp_path / "none.json", special=("[X]",)))
    with pytest.raises(UserError, match="does not mark <s> as a special token"):
        Tokenizer.load(given(tmp_path / "plain.json", mark=False))
    with pytest.raises(UserError, match="There is no tokenizer"):
        Tokenizer.load(tmp_path / "absent.json")


def test_prepare_takes_a_given_tokenizer_that_fits(tmp_path):
    write_texts(tmp_path / "text", 20)
    file = given(tmp_path / "tokenizer.json", words=[f"word{i}" for i in range(44)])
    config = make_config(tmp_path, tokenizer=str(file))
    config.model.vocab_size = 300
    with pytest.raises(UserError, match=r"has 301 tokens, more than model\.vocab_size \(300\)"):
        prepare(config, silent)
    config.model.vocab_size = 301
    prepared = prepare(config, silent)
    assert (prepared.vocab_size, prepared.document_id) == (301, 256)
    assert prepared.tokenizer_file.read_bytes() == file.read_bytes()
    settings = json.loads((tmp_path / "data" / "dataset.json").read_text())["settings"]
    assert settings["data.tokenizer"].startswith("sha256:")
    given(file, words=["another"])
    with pytest.raises(UserError, match=r"another data\.tokenizer"):
        prepare(config, silent)
