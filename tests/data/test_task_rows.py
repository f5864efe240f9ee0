"""Rows of task samples: what stands in them, in which order they come, and what they weigh, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.data import Tokenizer, TrainingData, open_prepared, validation_batches
from megahybrid.data.number_tokenizer import number_tokenizer
from megahybrid.data.order import ENDLESS
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from megahybrid.key import key
from megahybrid.tasks import TASKS, Answer, Sample, Span, Task, TaskParameters
from tests.data.corpora import SEQ_LENGTH, make_config, silent

DOCUMENT = 0


@dataclass
class EchoParameters(TaskParameters):
    """Of `Echo`."""

    shortest: int = key(0, at_least=0)
    """Tokens by which a sample may fall short of its length."""


class Echo(Task):
    """Its length, and tokens of which the last two are the answer; some samples are shorter, as those of text are."""

    name, parameters = "echo", EchoParameters

    def sample(self, parameters, length, vocabulary, draws, depth=None):
        size = length - int(draws.below(parameters.shortest + 1, 1)[0])
        tokens = np.append([vocabulary.document_id, length], 100 + draws.below(100, size - 2))
        return Sample(tokens, size - 2, (Answer(Span(size - 2, size), (Span(1, 2),)),))


class Written(Echo):
    """A task of text, which shows what its tokenizer makes of a word."""

    name, text = "written", True

    def sample(self, parameters, length, vocabulary, draws, depth=None):
        ids = vocabulary.tokenizer.encode("memory")
        return Sample(np.array([vocabulary.document_id, *ids]), 1, (Answer(Span(1, 1 + len(ids)), (), "memory"),))


@dataclass
class ReadingParameters(TaskParameters):
    """Of `Reading`."""

    file: str | None = key(None, may_change=True)
    """What it is of."""


class Reading(Echo):
    """A task of a file."""

    name, parameters = "reading", ReadingParameters

    def identity(self, parameters):
        return {"words": Path(parameters.file).read_text()}

    def sample(self, parameters, length, vocabulary, draws, depth=None):
        return super().sample(EchoParameters(), length, vocabulary, draws)


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setitem(TASKS, "echo", Echo())
    monkeypatch.setitem(TASKS, "reading", Reading())
    monkeypatch.setitem(TASKS, "written", Written())


def echo(weight=1.0, **more):
    return SourceConfig(format="task", task="echo", weight=weight, **more)


def bare(tmp_path, **sources):
    return make_config(tmp_path, sources or {"echo": echo()}, shuffle_block_size=16)


def mixed(corpus, text=1.0, **sources):
    """The prepared text beside tasks, 8 samples in 32 of blocks of 10."""
    config, _ = corpus
    small = replace(config.data.sources["small"], weight=text)
    return replace(config, data=replace(config.data, sources={"small": small, **sources}, shuffle_block_size=10))


def rows(config, steps, dp_rank=0, dp_size=1, consumed=0):
    """Of every step, index → (tokens, labels, weights, lengths of its sequences)."""
    found = []
    with TrainingData(config, dp_rank, dp_size, consumed) as data:
        for _ in range(steps):
            found.append({})
            for batch in data.next_step():
                borders = batch.sequences.cu_seqlens.tolist()
                for at in range(0, len(batch.tokens), SEQ_LENGTH):
                    part = slice(at, at + SEQ_LENGTH)
                    (index,) = set(batch.samples[part].tolist())
                    inside = [each - at for each in borders if at <= each < at + SEQ_LENGTH]
                    columns = (batch.tokens, batch.labels, batch.weights)
                    found[-1][index] = (*(column[part].tolist() for column in columns), inside)
    return found


def test_a_row_is_samples_end_to_end_and_then_document_tokens(tmp_path):
    """Read by a walk over the tokens: no sample has a document token but its first."""
    source = echo(parameters={"length": 9, "shortest": 3, "answer_weight": 2.0, "context_weight": 0.25})
    shapes = set()
    for step in rows(bare(tmp_path, echo=source), 8):
        for tokens, labels, weights, borders in step.values():
            assert labels[:-1] == tokens[1:]
            begins = [at for at, token in enumerate(tokens) if token == DOCUMENT and tokens[at : at + 2] != [0, 0]]
            begins = [at for at in begins if at < SEQ_LENGTH - 1]
            ends = [*begins[1:], next(at for at in range(begins[-1] + 1, SEQ_LENGTH + 1) if [*tokens, 0][at] == 0)]
            assert ends[-1] + 9 > SEQ_LENGTH >= ends[-1]  # no more fit
            expected = [0.0] * SEQ_LENGTH
            for begin, end in zip(begins, ends, strict=True):
                assert tokens[begin + 1] == 9 and 6 <= end - begin <= 9
                for at in range(max(begin, 1), end):
                    expected[at - 1] = 2.0 if at >= end - 2 else 0.25
            assert weights == expected
            assert borders == [*begins, ends[-1]] if ends[-1] < SEQ_LENGTH else begins
            shapes.add(tuple(borders))
    assert len(shapes) > 5


def test_a_sample_of_the_whole_row_fills_it(tmp_path):
    ((first, *_),) = (list(step.items()) for step in rows(bare(tmp_path), 1))
    _, (tokens, labels, weights, borders) = first
    assert tokens[:2] == [DOCUMENT, SEQ_LENGTH] and labels[-1] == DOCUMENT and borders == [0]
    assert weights == [0.0] * (SEQ_LENGTH - 3) + [1.0, 1.0, 0.0]


def test_samples_differ_by_row_place_source_and_seed(tmp_path):
    config = bare(tmp_path, a=echo(parameters={"length": 8}), b=echo(parameters={"length": 8}))
    found = rows(config, 4) + rows(replace(config, train=replace(config.train, seed=7)), 4)
    samples = [tuple(row[0][at : at + 8]) for step in found for row in step.values() for at in range(0, SEQ_LENGTH, 8)]
    assert len(set(samples)) == len(samples) == 8 * 8 * 4


@pytest.mark.parametrize("masking", [True, False])
def test_samples_are_documents_with_and_without_document_masking(corpus, masking):
    config = mixed(corpus, echo=echo(parameters={"length": 16}))
    config = replace(config, data=replace(config.data, document_masking=masking))
    texts = set()
    for step in rows(config, 4):
        for index, (_, _, weights, borders) in step.items():
            if index >= ENDLESS:
                assert borders == [0, 16]
            else:
                assert weights == [1.0] * SEQ_LENGTH
                texts.add(len(borders) > 1)
    assert texts == ({True, False} if masking else {False})


STAGES = [{"until": 7, "length": 4}, {"until": 13, "length": 8}, {"length": 16}]


def test_the_next_steps_rows_are_made_by_a_process(tmp_path):
    with TrainingData(bare(tmp_path), 0, 1) as data:
        data.next_step()
        made = data._rows._process.fetch()
        assert sorted(made) == sorted(data._indices(data.consumed))
        for index, row in made.items():
            for name, column in data._rows._make.row(index).items():
                assert column.dtype == row[name].dtype and np.array_equal(column, row[name])


def test_a_file_that_changed_is_said(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("one")
    source = SourceConfig(format="task", task="reading", weight=1.0, parameters={"file": str(file)})
    with TrainingData(bare(tmp_path, reading=source), 0, 1) as data:
        data.next_step()
        data.next_step()  # whose rows the process has made
        file.write_text("two")
        with pytest.raises(UserError, match=r"^A haystack of data\.sources is another one than when the run began;"):
            for _ in range(2):
                data.next_step()


def test_stages_come_in_the_order_of_the_rows_within_shuffled_blocks(corpus):
    """Row after row; where they stand in a block is random, and how many a block has is not."""
    seen, places = [], []
    for step in rows(mixed(corpus, text=2, echo=echo(stages=STAGES)), 8):
        for at, (index, row) in enumerate(step.items()):
            if index >= ENDLESS:
                seen.append(index - ENDLESS)
                places.append(at)
                expected = 4 if seen[-1] < 7 else 8 if seen[-1] < 13 else 16
                assert row[0][1] == expected
    assert seen == list(range(len(seen))) and abs(len(seen) - 8 * 8 / 3) < 3
    assert len(set(places)) == 8


def test_each_task_source_counts_its_own_rows(tmp_path):
    config = bare(tmp_path, a=echo(3.0, stages=STAGES), b=echo(1.0, stages=STAGES))
    seen = [index for step in rows(config, 10) for index in step]
    for number, share in ((1, 60), (2, 20)):
        mine = [index - number * ENDLESS for index in seen if index // ENDLESS == number]
        assert mine == list(range(share))


@pytest.mark.parametrize("dp_size", [2, 4])
def test_all_layouts_and_resumes_have_the_same_rows(corpus, dp_size):
    """Gone on from after every step: in the middle of blocks and of stages."""
    config = mixed(corpus, echo=echo(stages=STAGES), other=echo(parameters={"length": 5}))
    whole = rows(config, 6)
    for begin in range(6):
        ranks = [rows(config, 6 - begin, rank, dp_size, consumed=8 * begin) for rank in range(dp_size)]
        merged = [{k: v for part in parts for k, v in part.items()} for parts in zip(*ranks, strict=True)]
        assert merged == whole[begin:]


def test_a_source_of_weight_0_is_left_out_and_the_others_weigh_as_before(corpus):
    alone, _ = corpus
    config = mixed(corpus, echo=echo(0.0))
    with TrainingData(config, 0, 1) as data:
        assert all(batch.weights is None for batch in data.next_step())
    only = rows(mixed(corpus, text=0.0, echo=echo()), 2)
    assert all(index >= ENDLESS for step in only for index in step)
    with TrainingData(alone, 0, 1) as data:
        assert all(batch.weights is None for batch in data.next_step())


def test_validation_is_of_text_alone(corpus, tmp_path):
    alone, _ = corpus
    ours, theirs = validation_batches(mixed(corpus, echo=echo()), 0, 1), validation_batches(alone, 0, 1)
    with ours, theirs:
        assert [batch.tokens.tolist() for batch in ours] == [batch.tokens.tolist() for batch in theirs]
    with validation_batches(bare(tmp_path), 0, 1) as none:
        assert (len(none), none.samples, list(none)) == (0, 0, [])


def identity(config):
    with TrainingData(config, 0, 1) as data:
        return data.opened.identity


def test_identity_names_everything_that_decides_the_samples(corpus, tmp_path, monkeypatch):
    base = bare(tmp_path)
    same = [bare(tmp_path, echo=echo(2.0)), bare(tmp_path, echo=echo(parameters={"answer_weight": 1, "shortest": 0}))]
    assert {identity(config) for config in same} == {identity(base)}
    others = [
        bare(tmp_path, other=echo()),
        bare(tmp_path, echo=echo(), more=echo()),
        bare(tmp_path, echo=echo(parameters={"shortest": 1})),
        bare(tmp_path, echo=echo(parameters={"context_weight": 0.5})),
        bare(tmp_path, echo=echo(stages=STAGES)),
        bare(tmp_path, echo=echo(stages=[{"until": 8, "length": 4}, *STAGES[1:]])),
        replace(base, train=replace(base.train, seq_length=64)),
        replace(base, model=replace(base.model, vocab_size=400)),
        mixed(corpus, echo=echo()),
        corpus[0],
    ]
    found = [identity(config) for config in (base, *others)]
    monkeypatch.setattr(Echo, "version", 2)
    found.append(identity(base))
    assert len(set(found)) == len(found)
    assert found[-2] == open_prepared(corpus[0]).identity


def test_a_pinned_identity_covers_tasks(corpus, tmp_path):
    for config in (bare(tmp_path), mixed(corpus, echo=echo())):
        config = replace(config, data=replace(config.data, identity=identity(config)))
        assert identity(config) == config.data.identity
        changed = replace(config.data.sources["echo"], parameters={"shortest": 1})
        config.data.sources["echo"] = changed
        with pytest.raises(UserError, match=f"but data.identity is {config.data.identity}"):
            identity(config)


def test_prepare_writes_the_text_alone(corpus, tmp_path):
    config = mixed(corpus, echo=echo())
    lines = []
    prepare(config, lines.append)  # what lies there is what it would write
    assert "already prepared" in lines[0] and f'data.identity "{identity(config)}"' in lines[0]
    with pytest.raises(UserError, match=r"^All sources of the recipe are tasks.*nothing to prepare\.$"):
        prepare(bare(tmp_path), silent)


def test_tasks_of_text_write_with_the_tokenizer_of_the_text(corpus, tmp_path):
    written = SourceConfig(format="task", task="written", weight=1.0, parameters={"length": 8})
    file = open_prepared(corpus[0]).tokenizer_file
    tokenizer = Tokenizer.load(file)
    alone = make_config(tmp_path, {"written": written}, tokenizer=str(file))
    for config in (mixed(corpus, written=written), alone):
        row = next(row for index, row in rows(config, 1)[0].items() if index >= ENDLESS)
        ids = tokenizer.encode("memory")
        assert row[0][: 2 * len(ids) + 2] == 2 * [tokenizer.document_id, *ids]
        with TrainingData(config, 0, 1) as data:
            assert data.opened.tokenizer_json == file.read_text()
    small = replace(alone, model=replace(alone.model, vocab_size=tokenizer.vocab_size - 1))
    with pytest.raises(UserError, match=r"more than model\.vocab_size"):
        identity(small)
    with pytest.raises(UserError, match=r"writes text \(written\).*set data\.tokenizer\.$"):
        identity(make_config(tmp_path, {"written": written}))


def test_what_a_tokenizer_makes_impossible_is_found_when_the_data_is_opened(corpus, monkeypatch):
    def check(self, parameters, length, vocabulary):
        assert length == SEQ_LENGTH and vocabulary.size == 300 and vocabulary.document_id == 0
        raise UserError(f"{vocabulary.tokenizer.document_token} is odd.")

    monkeypatch.setattr(Written, "check", check)
    written = SourceConfig(format="task", task="written", weight=1.0)
    with pytest.raises(UserError, match=r"<\|endoftext\|> is odd"):
        identity(mixed(corpus, written=written))


def test_numbers_are_their_own_text(tmp_path):
    tokenizer = number_tokenizer(1000)
    assert (tokenizer.document_id, tokenizer.document_token, tokenizer.vocab_size) == (0, "<|endoftext|>", 1000)
    ids = [17, 4, 999, 1]
    assert tokenizer.decode(ids) == " 17 4 999 1"
    for text in ("17 4 999 1", " 17 4 999 1", "17 4\n 999  1 ", tokenizer.decode(ids)):
        assert tokenizer.encode(text) == ids
    assert tokenizer.encode(" ") == [] and tokenizer.encode("3<|endoftext|>4") == [3, 4]
    for text in ("0", "1000", "x", "1.5", "-3"):
        with pytest.raises(UserError, match="knows the numbers from 1 to 999, with spaces between them"):
            tokenizer.encode(text)
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.of_numbers and again.encode("17 4") == [17, 4] and again.decode(ids) == " 17 4 999 1"
    with TrainingData(bare(tmp_path), 0, 1) as data:
        assert data.opened.tokenizer_json == number_tokenizer(300).to_json()
