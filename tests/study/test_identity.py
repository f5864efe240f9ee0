"""What a run's identity follows, and what it does not."""

import dataclasses
from dataclasses import replace

import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.key import key
from megahybrid.study.identity import identify
from megahybrid.training.checkpoint_folder import name
from tests.config.test_load import QUICKSTART


@pytest.fixture(scope="module")
def config():
    return load_config(QUICKSTART)


def test_a_key_that_the_schema_gets_later_changes_no_identity(config):
    later = [
        ("later", int, key(3, may_change=True)),
        ("fixed", list, key([1])),
        ("half", int, key(None, otherwise=lambda train: train.steps // 2)),
    ]
    section = dataclasses.make_dataclass("Later", later, bases=(type(config.train),))

    def of(**values):
        return identify(replace(config, train=section(**vars(config.train), **values)), "data")

    same = identify(config, "data")
    assert same == of() == of(later=3, fixed=[1]) == of(half=config.train.steps // 2)
    assert len({same, of(later=4), of(fixed=[2]), of(half=7)}) == 4


def test_initial_weights_and_lambdas_count_by_what_is_in_them_not_by_where_they_lie(config, tmp_path):
    def weights(run, step, content, moments="m", weight=1.0):
        files = {"weights-00000.safetensors": {"blake2b": content}, "exp_avg-00000.safetensors": {"blake2b": moments}}
        regulators = {"L": {"lambdas": [[weight]], "kept": [[8.0]]}}
        facts = {"files": files, "regulators": regulators}
        write_json(tmp_path / run / "checkpoints" / name(step) / "checkpoint.json", facts)
        return str(tmp_path / run)

    def of(path):
        return identify(replace(config, train=replace(config.train, init_from=path)), "data")

    first = of(weights("a", 5, "w"))
    assert identify(config, "data") != first
    assert first == of(weights("b", 7, "w", "other")) == of(str(tmp_path / "a" / "checkpoints" / name(5)))
    assert first != of(weights("c", 5, "w", weight=2.0)), "heads are regulated otherwise"
    assert first != of(weights("a", 6, "v")), "the run has gone on"
    with pytest.raises(UserError, match="there is no checkpoint"):
        of(str(tmp_path / "none"))
