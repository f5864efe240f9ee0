"""Every layout reads the same global batches, and what is damaged is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megahybrid.config.schema import SourceConfig
from megahybrid.data import TrainingData, open_prepared, pack, validation_batches
from megahybrid.data.packing import views
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH, make_config, silent, write_texts


def rows(batches) -> dict[int, tuple]:
    """Sample index → its tokens and labels."""
    found = {}
    for batch in batches:
        assert batch.sample_positions.tolist() == list(range(SEQ_LENGTH)) * (len(batch.tokens) // SEQ_LENGTH)
        for at in range(0, len(batch.tokens), SEQ_LENGTH):
            part = slice(at, at + SEQ_LENGTH)
            (index,) = set(batch.samples[part].tolist())
            assert index not in found
            found[index] = (batch.tokens[part].tolist(), batch.labels[part].tolist())
    return found


def steps(config, dp_rank, dp_size, count, consumed=0):
    with TrainingData(config, dp_rank, dp_size, consumed) as data:
        return [rows(data.next_step()) for _ in range(count)]


@pytest.mark.parametrize("dp_size", [2, 4])
def test_all_layouts_have_the_same_global_batches(corpus, dp_size):
    config, _ = corpus
    with TrainingData(config, 0, 1) as data:
        count = 2 * data.samples_per_epoch // 8 + 1
    alone = steps(config, 0, 1, count)
    ranks = [steps(config, rank, dp_size, count) for rank in range(dp_size)]
    for step in range(count):
        parts = [rank[step] for rank in ranks]
        assert {len(part) for part in parts} == {8 // dp_size}
        merged = {index: row for part in parts for index, row in part.items()}
        assert len(merged) == 8
        assert merged == alone[step]


def test_micro_batches_cut_the_ranks_samples_in_order(corpus):
    config, _ = corpus
    with TrainingData(config, 1, 2) as data, TrainingData(config, 0, 1) as alone:
        batches = data.next_step()
        everything = [int(i) for batch in alone.next_step() for i in batch.samples[::SEQ_LENGTH]]
    assert [batch.samples[::SEQ_LENGTH].tolist() for batch in batches] == [everything[1::2][:2], everything[1::2][2:]]


def test_every_sample_comes_once_in_every_epoch(corpus):
    config, _ = corpus
    with TrainingData(config, 0, 1) as data:
        samples = data.samples_per_epoch
        assert samples == data.opened.prepared.samples("train") and samples % 8
        seen = [int(i) for _ in range(3 * samples // 8) for b in data.next_step() for i in b.samples[::SEQ_LENGTH]]
        assert data.consumed == len(seen)
    epochs = [seen[begin : begin + samples] for begin in range(0, 2 * samples + 1, samples)]
    for epoch in epochs[:2]:
        assert sorted(epoch) == list(range(samples))
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert not set(epochs[2]) - set(range(samples)) and len(set(epochs[2])) == len(epochs[2])


def test_resuming_anywhere_continues_the_same(corpus):
    config, _ = corpus
    whole = steps(config, 0, 1, 20)
    for step in (1, 7, 15):
        assert steps(config, 0, 1, 20 - step, consumed=step * 8) == whole[step:]
        resumed = [steps(config, rank, 4, 1, consumed=step * 8)[0] for rank in range(4)]
        assert {index: row for part in resumed for index, row in part.items()} == whole[step]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("wanted", [7, 1, 10_000])
def test_validation_counts_each_sample_once(corpus, dp_size, wanted):
    config, _ = corpus
    config = replace(config, train=replace(config.train, validation_samples=wanted))
    seen = []
    for rank in range(dp_size):
        with validation_batches(config, rank, dp_size) as data:
            first = [rows([batch]) for batch in data]
            assert [rows([batch]) for batch in data] == first
            assert len(first) == len(data)
            seen += [index for part in first for index in part]
    assert sorted(seen) == list(range(min(wanted, open_prepared(config).samples("validation"))))


def test_labels_follow_and_stop_at_documents(corpus):
    config, _ = corpus
    document_id = open_prepared(config).document_id
    with TrainingData(config, 0, 1) as data:
        batches = [batch for _ in range(data.samples_per_epoch // 8) for batch in data.next_step()]
    ends = 0
    for batch in batches:
        assert {tensor.dtype for tensor in (batch.tokens, batch.labels, batch.samples)} == {torch.int64}
        borders = list(batch.sequences.borders)
        starts = [i for i, token in enumerate(batch.tokens.tolist()) if token == document_id or i % SEQ_LENGTH == 0]
        assert borders == [*starts, len(batch.tokens)]
        for begin, end in pairwise(borders):
            assert batch.labels[begin : end - 1].tolist() == batch.tokens[begin + 1 : end].tolist()
            if end % SEQ_LENGTH:
                ends += 1
                assert batch.labels[end - 1] == document_id
    assert ends > 50


def test_pack_by_hand():
    samples = [
        {"tokens": np.array([5, 6, 0, 7, 0], np.uint16), "borders": np.array([0, 2], np.int32)},
        {"tokens": np.array([0, 8, 9, 8, 60_000], np.uint16), "borders": np.array([0], np.int32)},
    ]
    batch = pack(samples, [4, 2], document_masking=True)
    assert batch.tokens.tolist() == [5, 6, 0, 7, 0, 8, 9, 8]
    assert batch.labels.tolist() == [6, 0, 7, 0, 8, 9, 8, 60_000]
    assert batch.samples.tolist() == [4] * 4 + [2] * 4
    assert batch.sample_positions.tolist() == [0, 1, 2, 3] * 2
    assert batch.sequences.lengths == (2, 2, 4)
    assert batch.sequences.cu_seqlens.tolist() == [0, 2, 4, 8]
    assert pack(samples, [4, 2], document_masking=False).sequences.lengths == (4, 4)
    moved = batch.to("cpu")
    assert moved.tokens.tolist() == batch.tokens.tolist() and moved.sequences.lengths == (2, 2, 4)


def test_tensors_that_move_together_are_as_far_apart_as_an_allocator_has_them():
    tensors = [torch.arange(3), torch.tensor(2.5), torch.arange(300, dtype=torch.int32).view(3, 100), torch.ones(1)]
    row = torch.zeros(512 * 6, dtype=torch.uint8)
    for there, tensor in zip(views(row, tensors), tensors, strict=True):
        assert (there.data_ptr() - row.data_ptr()) % 512 == 0
        there.copy_(tensor)
    found = views(row.clone(), tensors)
    assert [x.dtype for x in found] == [x.dtype for x in tensors]
    assert all(map(torch.equal, found, tensors))


def test_sources_are_laid_together(tmp_path):
    for name, documents in (("second", 30), ("first", 20)):
        write_texts(tmp_path / name, documents, seed=documents)
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("second", "first")}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "one.txt").write_text("x")  # less than a sample
    config = make_config(tmp_path, {**sources, "tiny": SourceConfig(str(tmp_path / "tiny"))})
    prepared = prepare(config, silent)
    assert prepared.sources["tiny"]["train"].samples == 0
    assert list(prepared.sources_of("train")) == ["first", "second"]
    first = prepared.sources["first"]["train"].samples
    with TrainingData(config, 0, 1) as data:
        found = {}
        for _ in range(data.samples_per_epoch // 8 + 1):
            found |= rows(data.next_step())
        assert max(found) < prepared.samples("train")
    assert min(found) < first <= max(found)


def test_two_readers_at_once_and_after_closing(corpus):
    config, _ = corpus
    expected = steps(config, 0, 1, 3)
    with (
        TrainingData(config, 0, 1) as one,
        TrainingData(config, 0, 1) as two,
        validation_batches(config, 0, 1) as three,
    ):
        one.close()
        assert [rows(two.next_step()) for _ in range(3)] == expected
        assert len(list(three))


@pytest.fixture
def copy(corpus, tmp_path):
    """The corpus's recipe with its own copy of the data."""
    config, _ = corpus
    shutil.copytree(config.data.path, tmp_path / "data")
    return replace(config, data=replace(config.data, path=str(tmp_path / "data")))


def _refused(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message
    return message


def test_missing_and_cut_files_are_named_at_once(copy):
    folder = Path(copy.data.path) / "small" / "train"
    shard = folder / "shard.00002.mds"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"'{shard}' has {len(content) - 1} bytes" in _refused(lambda: TrainingData(copy, 0, 1))
    shard.unlink()
    assert f"'{shard}' is missing" in _refused(lambda: TrainingData(copy, 0, 1))
    shard.write_bytes(content)
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index[:-5])
    assert "index.json' is not the one that dataset.json names" in _refused(lambda: TrainingData(copy, 0, 1))
    (folder / "index.json").unlink()
    assert "index.json' is missing or unreadable" in _refused(lambda: TrainingData(copy, 0, 1))


def test_a_flipped_bit_is_named_before_its_tokens_are_used(copy):
    shard = Path(copy.data.path) / "small" / "train" / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with TrainingData(copy, 0, 1) as data:

        def epoch():
            for _ in range(data.samples_per_epoch // 8 + 1):
                before = data.consumed
                data.next_step()
                assert data.consumed == before + 8

        assert f"'{shard}' does not match its xxh64 hash" in _refused(epoch)


def test_a_shard_that_vanishes_or_shrinks_later_is_named(copy):
    shards = sorted((Path(copy.data.path) / "small" / "train").glob("*.mds"))
    with TrainingData(copy, 0, 1) as data:
        for _ in range(data.samples_per_epoch // 8 + 1):
            data.next_step()  # every shard has been verified
        for shard in shards:
            shard.write_bytes(shard.read_bytes()[:40])
        assert "cannot be read" in _refused(data.next_step)
        for shard in shards:
            shard.unlink()
        assert "is missing" in _refused(data.next_step)


def test_a_step_that_is_prepared_is_the_next_one(corpus):
    config, _ = corpus
    expected = steps(config, 0, 1, 3)
    with TrainingData(config, 0, 1) as data:
        for step in expected:
            data.prepare()
            data.prepare()
            consumed = data.consumed
            assert rows(data.next_step()) == step
            assert data.consumed == consumed + 8 and data.seconds > 0
        data.prepare()
        data.seek(8)
        assert rows(data.next_step()) == expected[1]


def test_what_is_wrong_with_a_prepared_step_is_told_when_it_is_asked_for(copy):
    with TrainingData(copy, 0, 1) as data:
        before = rows(data.next_step())
        for shard in (Path(copy.data.path) / "small" / "train").glob("*.mds"):
            shard.write_bytes(b"")
        data.prepare()
        assert data.consumed == len(before) == 8
        for _ in range(2):
            assert "cannot be read" in _refused(data.next_step)
        assert data.consumed == 8
        data.prepare()
        data.seek(16)
        assert data._prepared is None


def test_what_does_not_fit_the_prepared_data_is_refused(copy):
    def recipe(section, **changes):
        return replace(copy, **{section: replace(getattr(copy, section), **changes)})

    assert "run `megahybrid prepare`" in _refused(lambda: TrainingData(recipe("data", path="/nowhere"), 0, 1))
    longer = _refused(lambda: TrainingData(recipe("train", seq_length=64), 0, 1))
    assert "samples of 32 tokens, shorter than train.seq_length (64)" in longer
    assert "(24) does not divide" in _refused(lambda: TrainingData(recipe("train", seq_length=24), 0, 1))
    assert "model.vocab_size (258)" in _refused(lambda: TrainingData(recipe("model", vocab_size=258), 0, 1))
    assert "fewer than train.global_batch_size (4,096)" in _refused(
        lambda: TrainingData(recipe("train", global_batch_size=4096), 0, 1)
    )
    assert "must be a multiple of train.micro_batch_size" in _refused(lambda: TrainingData(copy, 0, 3))
    assert "has read 12 samples" in _refused(lambda: TrainingData(copy, 0, 1, consumed=12))
    tokenizer = Path(copy.data.path) / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert "not the tokenizer" in _refused(lambda: TrainingData(copy, 0, 1))
    (Path(copy.data.path) / "dataset.json").write_text("{")
    assert "dataset.json' is not readable" in _refused(lambda: TrainingData(copy, 0, 1))
