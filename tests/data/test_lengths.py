"""How long sequences are, against those of an epoch's batches."""

from dataclasses import replace

import numpy as np
import pytest

from megahybrid.config.schema import SourceConfig
from megahybrid.data import TrainingData, lengths
from megahybrid.data.lengths import sequence_lengths
from megahybrid.data.prepare import prepare
from tests.data.corpora import SEQ_LENGTH, make_config, silent


def seen_in_an_epoch(config):
    """Tokens of the own sequence that a token sees on average if it sees all, in what training reads."""
    with TrainingData(config, 0, 1) as data:
        batches = [batch for _ in range(data.samples_per_epoch // 8) for batch in data.next_step()]
    found = np.concatenate([np.diff(batch.sequences.cu_seqlens) for batch in batches])
    return (found**2).sum() / found.sum()


def mean(config):
    found = sequence_lengths(config)
    assert sum(found.values()) == pytest.approx(1) and max(found) <= config.train.seq_length
    return sum(length * part for length, part in found.items())


def test_they_are_those_of_the_batches(corpus):
    config, _ = corpus
    assert 0.1 * SEQ_LENGTH < mean(config) < 0.9 * SEQ_LENGTH
    assert mean(config) == pytest.approx(seen_in_an_epoch(config), rel=0.03)
    halves = replace(config, train=replace(config.train, seq_length=SEQ_LENGTH // 2))
    assert mean(halves) == pytest.approx(seen_in_an_epoch(halves), rel=0.03) and mean(halves) < mean(config)


def test_sources_count_by_their_weights(tmp_path):
    for name, words, count in (("short", 1, 400), ("long", 200, 4)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text("once upon a time " * words)
    found = []
    for weight in (0.2, 5.0):
        weights = {"short": 1.0, "long": weight}
        config = make_config(
            tmp_path, {name: SourceConfig(str(tmp_path / name), weight=each) for name, each in weights.items()}
        )
        prepare(config, silent)
        found.append(mean(config))
        assert found[-1] == pytest.approx(seen_in_an_epoch(config), rel=0.05)
    assert found[1] > 1.4 * found[0]


def test_samples_are_read_from_all_over_a_source():
    """Files may stand by their size."""
    for shards in ([1000], [400, 600], [50] * 20):
        chosen = np.array(list(lengths._indices([np.array(shards)], [64])))
        assert len(chosen) == 64 and max(np.diff(np.sort(chosen), prepend=0, append=sum(shards))) <= sum(shards) / 6


def test_without_masks_or_data(corpus, tmp_path):
    config, _ = corpus
    assert sequence_lengths(replace(config, data=replace(config.data, document_masking=False))) == {SEQ_LENGTH: 1.0}
    assert sequence_lengths(replace(config, data=replace(config.data, path=str(tmp_path)))) is None
    assert sequence_lengths(replace(config, data=replace(config.data, remote="s3://there/data"))) is None


def test_groups_keep_what_tokens_see():
    drawn = np.random.default_rng(0).geometric(1 / 300, 5000)
    found = lengths._grouped(drawn)
    assert len(found) <= 64
    # A quadratic, and a window of 100.
    for sees in (lambda n: (n + 1) / 2, lambda n: np.where(n < 100, (n + 1) / 2, 100 - 4950 / n)):
        exact = (drawn * sees(drawn)).sum() / drawn.sum()
        assert sum(part * sees(length) for length, part in found.items()) == pytest.approx(exact, rel=2e-3)
