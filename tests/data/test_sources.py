"""Several sources by weight, and samples read in shorter pieces than they were prepared in."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.config.validate import validate
from megahybrid.data import TrainingData, validation_batches
from megahybrid.data.prepare import prepare
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH, make_config, silent, write_texts


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Prepared sources: large, medium and tiny, the last without a sample to train on."""
    root = tmp_path_factory.mktemp("three")
    for name, documents in (("large", 60), ("medium", 20)):
        write_texts(root / name, documents, seed=documents)
    (root / "tiny").mkdir()
    (root / "tiny" / "one.txt").write_text("x")
    config = make_config(root, {name: SourceConfig(str(root / name)) for name in ("medium", "large", "tiny")})
    prepare(config, silent)
    return config


def weighted(config: Config, **weights: float | None) -> Config:
    sources = {name: replace(source, weight=weights.get(name)) for name, source in config.data.sources.items()}
    return replace(config, data=replace(config.data, sources=sources))


def sources_read(config: Config, samples: int) -> tuple[Counter, Counter]:
    """How many samples of each source the order has, and how often each sample comes, by its tokens."""
    counts: Counter = Counter()
    times: Counter = Counter()
    with TrainingData(config, 0, 1) as data:
        sizes = {name: int(shards.sum()) for name, shards in data._reader.shard_samples.items()}
        while data.consumed < samples:
            for batch in data.next_step():
                for index in batch.samples[::SEQ_LENGTH].tolist():
                    for name, size in sizes.items():
                        if index < size:
                            counts[name] += 1
                            times[name, index] += 1
                            break
                        index -= size
    return counts, times


def test_without_weights_every_sample_comes_once(three):
    with TrainingData(three, 0, 1) as data:
        total = data.samples_per_epoch
        assert total == data.opened.prepared.samples("train")
    counts, times = sources_read(three, total * 8)
    assert set(times.values()) == {8} and counts["large"] > 2 * counts["medium"] > 0
    assert sources_read(weighted(three, tiny=0), total)[0] == sources_read(three, total)[0]


def test_weights_set_the_shares_whatever_the_sizes(three):
    config = weighted(three, large=1, medium=3, tiny=0)
    with TrainingData(config, 0, 1) as data:
        total = data.samples_per_epoch
        ranks = [TrainingData(config, rank, 4) for rank in range(4)]
        whole = [[i for batch in data.next_step() for i in batch.samples[::32].tolist()] for _ in range(9)]
        parts = [[[i for b in rank.next_step() for i in b.samples[::32].tolist()] for _ in range(9)] for rank in ranks]
        for step, indices in enumerate(whole):
            assert [part[step] for part in parts] == [indices[rank::4] for rank in range(4)]
    counts, times = sources_read(config, total * 8)
    assert abs(counts["medium"] - 0.75 * total * 8) <= 8 and counts.total() == total * 8
    for name in ("large", "medium"):
        often = [count for (source, _), count in times.items() if source == name]
        assert max(often) - min(often) <= 1


def test_a_weight_of_zero_leaves_a_source_out(three):
    config = weighted(three, large=0)
    with TrainingData(config, 0, 1) as data:
        assert data.samples_per_epoch == data.opened.prepared.sources["medium"]["train"].samples
    counts, _ = sources_read(config, 100)
    assert set(counts) == {"medium"}
    with (
        validation_batches(weighted(three, medium=0, tiny=0), 0, 1) as without,
        validation_batches(three, 0, 1) as all_,
    ):
        assert 0 < len(without._reader) < len(all_._reader)


def test_an_unused_source_may_be_gone(three, tmp_path):
    shutil.copytree(three.data.path, tmp_path / "data")
    config = replace(three, data=replace(three.data, path=str(tmp_path / "data")))
    shutil.rmtree(tmp_path / "data" / "large")
    with pytest.raises(UserError, match=r"large/train/index\.json' is missing"):
        TrainingData(config, 0, 1)
    TrainingData(weighted(config, large=0), 0, 1).close()


def test_a_foreign_shard_or_source_is_named(three, tmp_path):
    shutil.copytree(three.data.path, tmp_path / "data")
    config = replace(three, data=replace(three.data, path=str(tmp_path / "data")))
    shutil.rmtree(tmp_path / "data" / "medium")
    shutil.copytree(tmp_path / "data" / "large", tmp_path / "data" / "medium")  # whole, with an index of its own
    with pytest.raises(UserError, match=r"medium/train/index\.json' is not the one that dataset\.json names"):
        TrainingData(config, 0, 1)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(three.data.path, tmp_path / "data")
    large, medium = (next((tmp_path / "data" / name / "train").glob("*.mds")) for name in ("large", "medium"))
    shutil.copyfile(large, medium)
    with pytest.raises(UserError, match=r"medium/train/shard\.00000\.mds' has \d+ bytes, not"):
        TrainingData(config, 0, 1)


def test_validation_takes_of_every_source_its_share(three):
    config = replace(three, train=replace(three.train, validation_samples=8))
    with validation_batches(config, 0, 1) as data:
        sizes = [int(shards.sum()) for shards in data._reader.shard_samples.values()]
        indices = [i for batch in data for i in batch.samples[::SEQ_LENGTH].tolist()]
    assert len(sizes) == 2 and min(sizes) > 0 and len(indices) == min(8, sum(sizes))
    assert 0 in indices and sizes[0] in indices and data.unread == []
    config.train.validation_samples = 1
    with validation_batches(config, 0, 1) as data:
        assert data.samples == 1 and data.unread == ["medium"]
    with validation_batches(weighted(config, large=1, medium=0, tiny=0), 0, 1) as data:
        assert data.unread == []


def test_why_there_is_nothing_of_a_source_to_validate_on(tmp_path):
    """Each source's own reason."""
    write_texts(tmp_path / "large", 60)
    for name, files in (("one", 1), ("single", 1), ("short", 6)):
        (tmp_path / name).mkdir()
        for number in range(files):
            (tmp_path / name / f"{number}.txt").write_text("x")
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("large", "one", "short", "single")}
    (tmp_path / "two.jsonl").write_text('{"text": "x"}\n' * 2)
    sources["two"] = SourceConfig(str(tmp_path / "two.jsonl"), "jsonl")
    said: list[str] = []
    prepare(make_config(tmp_path, sources, validation_fraction=0.4), said.append)
    assert [line for line in said if "without" in line] == [
        f"Validation will be without {names}, since {why}."
        for names, why in (
            ("one, single", "a single document is trained on; cut it into several to hold some out"),
            ("short", "what is held out is less than one sample; raise data.validation_fraction to hold out more"),
            ("two", "no document was drawn; raise data.validation_fraction to hold out more"),
        )
    ]
    said.clear()
    large = {"large": SourceConfig(str(tmp_path / "large"))}
    prepare(make_config(tmp_path / "all", large, validation_fraction=0), said.append)
    assert said and not [line for line in said if "without" in line]


def test_impossible_weights_and_sources_are_refused(three):
    cases = {
        "Every source in data.sources has weight 0": weighted(three, large=0, medium=0, tiny=0),
        "but not for tiny; give every source one": weighted(three, large=1, medium=2),
        r"medium\.weight is -1": weighted(three, large=1, medium=-1, tiny=0),
        r"medium\.weight is nan": weighted(three, large=1, medium=float("nan"), tiny=0),
        r"data\.remote needs data\.cache": replace(three, data=replace(three.data, remote="s3://x")),
        r"data\.path 's3://x' must be a local folder": replace(three, data=replace(three.data, path="s3://x")),
        r"large\.format is 'csv'; choose one of text, jsonl": replace(
            three, data=replace(three.data, sources={"large": SourceConfig("x", format="csv")})
        ),
    }
    for expected, config in cases.items():
        with pytest.raises(UserError, match=expected):
            validate(config)
    cases = {
        r"data\.sources\.tiny has a weight but less than one sample": weighted(three, large=1, medium=1, tiny=1),
        "weight is so small that": weighted(three, large=1, medium=1e-9, tiny=0),
        "No source is left": weighted(three, large=0, medium=0),
        "was prepared from large, medium, tiny, but data.sources names large": replace(
            three, data=replace(three.data, sources={"large": three.data.sources["large"]})
        ),
    }
    for expected, config in cases.items():
        validate(config)
        with pytest.raises(UserError, match=expected):
            TrainingData(config, 0, 1)


@pytest.mark.parametrize("length", [16, 8, 1])
def test_shorter_sequences_are_pieces_of_the_samples(corpus, length):
    config, _ = corpus
    short = replace(config, train=replace(config.train, seq_length=length))
    pieces = SEQ_LENGTH // length
    with TrainingData(config, 0, 1) as whole, TrainingData(short, 0, 1) as data:
        assert data.samples_per_epoch == pieces * whole.samples_per_epoch
        assert len(data._reader) == pieces * len(whole._reader)
        for i in (0, 5, len(whole._reader) - 1):
            sample = whole._reader[i]
            borders = []
            for piece in range(pieces):
                part = data._reader[i * pieces + piece]
                begin = piece * length
                assert part["tokens"].tolist() == sample["tokens"][begin : begin + length + 1].tolist()
                assert part["borders"].dtype == sample["borders"].dtype and part["borders"][0] == 0
                borders += (part["borders"] + begin).tolist()
            assert set(borders) == set(sample["borders"].tolist()) | set(range(0, SEQ_LENGTH, length))
        seen = [
            int(i) for _ in range(data.samples_per_epoch // 8) for b in data.next_step() for i in b.samples[::length]
        ]
        assert len(seen) == len(set(seen)) == data.samples_per_epoch // 8 * 8
    with validation_batches(short, 0, 1) as data:
        assert sum(len(batch.tokens) for batch in data) == 7 * length


def test_prepared_says_what_it_is(three, tmp_path):
    """The identity follows the tokens, not the place."""
    from megahybrid.data import open_prepared

    shutil.copytree(three.data.path, tmp_path / "data")
    moved = replace(three, data=replace(three.data, path=str(tmp_path / "data")))
    assert open_prepared(moved).identity == open_prepared(three).identity
    other = make_config(tmp_path / "other", {"large": three.data.sources["large"]})
    assert prepare(other, silent).identity != open_prepared(three).identity
    assert Path(open_prepared(three).tokenizer_file).is_file()
