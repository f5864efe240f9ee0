"""Shards behind a cache: the same samples as from a folder, and every fault named, with nothing left over."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.data import TrainingData, open_prepared, validation_batches
from megahybrid.data.fetching import Fetcher
from megahybrid.errors import UserError
from tests.data.corpora import SEQ_LENGTH
from tests.data.object_store import ENVIRONMENT, serve
from tools.workers import environment, python

SHARD = "shard.00001.mds"


@pytest.fixture
def store(corpus, monkeypatch):
    config, _ = corpus
    with serve(Path(config.data.path)) as store:
        for name, value in {**ENVIRONMENT, "S3_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("megahybrid.retry._FIRST_PAUSE", 0.001)
        monkeypatch.setattr("megahybrid.retry.SECONDS", 0.1)
        yield store


@pytest.fixture
def recipe(corpus, tmp_path):
    """The corpus's recipe, reading from s3://bucket through an empty cache."""
    config, _ = corpus
    return replace(config, data=replace(config.data, remote="s3://bucket", cache=str(tmp_path / "cache")))


def with_data(config, **changes):
    return replace(config, data=replace(config.data, **changes))


def epoch(config) -> list[list[int]]:
    """The tokens of every global batch of an epoch."""
    with TrainingData(config, 0, 1) as data:
        steps = [data.next_step() for _ in range(data.samples_per_epoch // 8 + 1)]
    return [batch.tokens.tolist() for step in steps for batch in step]


def refused(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message.replace("..", "")
    return message


def cached(config) -> list[Path]:
    return sorted(path for path in Path(config.data.cache).rglob("*") if path.is_file() and ".locks" not in path.parts)


def bytes_of_shards(config) -> int:
    """What the cache's shards take; the look-ahead thread may throw one out while they are counted."""
    total = 0
    for path in cached(config):
        if path.suffix == ".mds":
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def test_the_samples_are_those_of_the_folder_and_fetched_once(corpus, recipe, store):
    config, _ = corpus
    expected = epoch(config)
    assert epoch(recipe) == expected
    assert set(store.downloads.values()) == {1}
    with validation_batches(recipe, 0, 1) as remote, validation_batches(config, 0, 1) as local:
        assert [batch.tokens.tolist() for batch in remote] == [batch.tokens.tolist() for batch in local]
    assert open_prepared(recipe).tokenizer_file.is_file()
    before = dict(store.downloads)
    assert epoch(recipe) == expected
    assert {name for name in before if store.downloads[name] > before[name]} == {"dataset.json"}
    for path in cached(recipe):
        original = Path(config.data.path) / path.relative_to(open_prepared(recipe).root)
        assert path.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing", "cannot be downloaded"),
        ("error", "kept failing"),
        ("broken", "kept failing"),
        ("cut", "bytes, not"),
        ("flipped", "does not match its xxh64 hash"),
    ],
)
def test_a_faulty_shard_is_named_and_leaves_nothing(corpus, recipe, store, fault, named):
    config, _ = corpus
    expected = epoch(config)
    store.faults[SHARD] = fault
    got = []
    with TrainingData(recipe, 0, 1) as data:

        def go_on():
            while data.consumed < 8 * len(expected) // 4:
                got.extend(batch.tokens.tolist() for batch in data.next_step())

        for _ in range(2):  # not once and for all
            message = refused(go_on)
            assert f"'s3://bucket/small/train/{SHARD}' " in message and named in message
        assert not [path for path in cached(recipe) if SHARD in path.name]
        consumed = data.consumed
        store.faults.clear()  # the store has recovered: so does the run, where it stood
        go_on()
    assert consumed % 8 == 0 and got == expected[: len(got)] and len(got) >= len(expected) - 4
    assert not [path for path in cached(recipe) if "part" in path.name]


@pytest.mark.parametrize("name", ["dataset.json", "index.json", "tokenizer.json"])
@pytest.mark.parametrize("fault", ["missing", "cut", "flipped"])
def test_a_faulty_description_is_named(recipe, store, name, fault):
    store.faults[name] = fault
    if (name, fault) == ("dataset.json", "flipped"):
        store.faults[name] = "cut"
    assert name in refused(lambda: TrainingData(recipe, 0, 1))
    store.faults.clear()
    TrainingData(recipe, 0, 1).close()


def test_what_the_cache_spoils_is_fetched_again(corpus, recipe, store):
    config, _ = corpus
    expected = epoch(config)
    epoch(recipe)
    flipped, cut, index, *others = [path for path in cached(recipe) if path.suffix == ".mds"][:4]
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    index.unlink()
    (index.parent / "index.json").write_text("{}")
    (index.parent / f".{index.name}.part.Ab12").write_text("of a killed process")
    store.downloads.clear()
    assert epoch(recipe) == expected
    assert store.downloads == {flipped.name: 1, cut.name: 1, index.name: 1, "index.json": 1, "dataset.json": 1}
    assert others and not [path for path in cached(recipe) if "part" in path.name]


def test_a_shard_thrown_out_by_another_process_is_fetched_again(corpus, recipe, store):
    config, _ = corpus
    expected = epoch(config)
    with TrainingData(recipe, 0, 1) as data:
        got = []
        for _ in range(len(expected) // 4):
            got += [batch.tokens.tolist() for batch in data.next_step()]
            for path in cached(recipe):
                if path.suffix == ".mds":
                    path.unlink()
    assert got == expected[: len(got)]


def test_silence_has_a_deadline(recipe, store, monkeypatch):
    epoch(recipe)
    next(path for path in cached(recipe) if path.name == SHARD).unlink()
    store.faults[SHARD] = "silent"
    monkeypatch.setattr("megahybrid.data.shards._SECONDS", 1.5)
    began = time.monotonic()
    assert f"{SHARD}' was not there after" in refused(lambda: epoch(recipe))
    assert time.monotonic() - began < 8


def test_a_download_that_stands_still_is_given_up(recipe, store, monkeypatch):
    monkeypatch.setattr("megahybrid.data.downloads._SECONDS", 0.5)
    epoch(recipe)
    next(path for path in cached(recipe) if path.name == SHARD).unlink()
    store.faults[SHARD] = "silent"
    began = time.monotonic()
    assert f"{SHARD}' kept failing for 0 s (Read timeout" in refused(lambda: epoch(recipe))
    assert time.monotonic() - began < 15


def test_a_process_that_holds_a_lock_is_not_waited_for_for_ever(recipe, store, monkeypatch):
    monkeypatch.setattr("megahybrid.data.stores._LOCK_SECONDS", 0.3)
    monkeypatch.setattr("megahybrid.data.stores._LOCKS", 1)
    open_prepared(recipe)
    with open(Path(recipe.data.cache) / ".locks" / "0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another process has been fetching" in refused(lambda: open_prepared(recipe))
    open_prepared(recipe)


def test_the_cache_keeps_its_limit(corpus, recipe, store):
    config, _ = corpus
    expected = epoch(with_data(config, shuffle_block_size=16))
    small = with_data(recipe, shuffle_block_size=16, cache_limit=5e-6)
    assert "data.cache_limit is 5e-06 GB, but the shards in use" in refused(lambda: TrainingData(small, 0, 1))
    total = sum(path.stat().st_size for path in Path(config.data.path).rglob("train/*.mds"))
    limit = 9_000
    assert limit < total * 0.7
    limited = with_data(small, cache_limit=limit / 1e9)
    with TrainingData(limited, 0, 1) as data:
        got = []
        for _ in range(len(expected) // 4):
            got += [batch.tokens.tolist() for batch in data.next_step()]
            assert bytes_of_shards(limited) <= limit + 4 * 2000  # those that are on their way
    assert got == expected[: len(got)]
    assert max(store.downloads[path.name] for path in Path(config.data.path).rglob("train/*.mds")) <= 4


def test_shards_are_there_before_they_are_needed(recipe, store):
    small = with_data(recipe, shuffle_block_size=16)
    with TrainingData(small, 0, 1) as data:
        data.next_step()
        wanted = {f"shard.{shard:05}.mds" for block in [(0, 0), (0, 1)] for shard in data._order.shards(*block)}
        deadline = time.monotonic() + 10
        while not wanted <= {path.name for path in cached(small)} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert wanted <= {path.name for path in cached(small)}
        everything = len(data._reader.shards)
        assert len([path for path in cached(small) if path.suffix == ".mds"]) < everything


def test_later_epochs_look_ahead_as_the_first_does(recipe, corpus, monkeypatch):
    """What the limit has thrown out since it was ready is fetched before it is read, not when."""
    waited, require = [], Fetcher.require

    def note(self, number):
        if number not in self._ready:
            waited.append(data.consumed // data.samples_per_epoch)
        require(self, number)

    monkeypatch.setattr(Fetcher, "require", note)
    remote = corpus[0].data.path
    limited = with_data(recipe, remote=remote, shuffle_block_size=16, cache_limit=9e-6)
    with TrainingData(limited, 0, 1) as data:
        while data.consumed < 2 * data.samples_per_epoch:
            data.next_step()
            deadline = time.monotonic() + 10  # a real step takes longer than a fetch
            while (data._reader._fetcher._ahead or data._reader._fetcher._running) and time.monotonic() < deadline:
                time.sleep(0.001)
        assert len(data._reader.shards) > 8 > 2 * waited.count(1)


def test_a_folder_can_be_the_remote(corpus, recipe, tmp_path):
    config, _ = corpus
    shutil.copytree(config.data.path, tmp_path / "shared")
    local = with_data(recipe, remote=str(tmp_path / "shared"))
    assert epoch(local) == epoch(config)
    (tmp_path / "shared" / "small" / "train" / SHARD).unlink()
    assert epoch(local) == epoch(config)  # the cache has it
    shutil.rmtree(local.data.cache)
    assert f"{SHARD}' cannot be downloaded" in refused(lambda: epoch(local))


def test_what_cannot_be_a_remote_is_refused(recipe, tmp_path):
    assert "is of no kind that can be read" in refused(lambda: open_prepared(with_data(recipe, remote="ftp://x/y")))
    (tmp_path / "file").touch()
    odd = with_data(recipe, remote=str(tmp_path), cache=str(tmp_path / "file"))
    assert "data.cache" in refused(lambda: open_prepared(odd))


_READ = """
import hashlib, sys
from megahybrid.config import load_config
from tests.data.test_remote import epoch
print(hashlib.sha256(str(epoch(load_config(sys.argv[1]))).encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_real_server_and_two_processes_with_one_cache(corpus, recipe, tmp_path, monkeypatch):
    """moto_server, which is not ours: what our small one leaves out does not matter."""
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server: pip install moto[server]")
    from megahybrid.config import save_config

    config, _ = corpus
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        for name, value in {**ENVIRONMENT, "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
            monkeypatch.setenv(name, value)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        import boto3

        client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
        client.create_bucket(Bucket="bucket")
        for path in Path(config.data.path).rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"folder/{path.relative_to(config.data.path).as_posix()}")
        recipe = with_data(recipe, remote="s3://bucket/folder")
        save_config(recipe, tmp_path / "recipe.yaml")
        command = [python(), "-c", _READ, str(tmp_path / "recipe.yaml")]
        both = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=120)[0].split()[-1] for process in both]
        assert said[0] == said[1]
        assert epoch(recipe) == epoch(config)
        client.delete_object(Bucket="bucket", Key=f"folder/small/train/{SHARD}")
        shutil.rmtree(recipe.data.cache)
        assert f"{SHARD}' cannot be downloaded" in refused(lambda: epoch(recipe))
    finally:
        server.kill()
        server.wait()


def test_the_tests_read_what_they_think(corpus):
    """The corpus has enough shards and samples for the tests above."""
    config, _ = corpus
    with TrainingData(config, 0, 1) as data:
        assert len(data._reader.shards) > 8 and data.samples_per_epoch > 100
        assert data._config.train.seq_length == SEQ_LENGTH
