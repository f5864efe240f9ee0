"""A stale handle, an I/O error or a server that is out for a moment ends no run; what stays out is the machine's."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megahybrid.data import TrainingData, loader, mds, stores, validation_batches
from megahybrid.data.downloads import Passing, _is_final
from megahybrid.errors import MachineFault, UserError
from tests.data.object_store import ENVIRONMENT, serve

SHARD = "shard.00001.mds"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("megahybrid.retry._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("megahybrid.retry._LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("megahybrid.retry.SECONDS", 20.0)


@pytest.fixture
def store(corpus, monkeypatch):
    with serve(Path(corpus[0].data.path)) as store:
        for name, value in {**ENVIRONMENT, "S3_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture
def remote(corpus, tmp_path):
    """The corpus's recipe, reading from s3://bucket through an empty cache."""
    config, _ = corpus
    return replace(config, data=replace(config.data, remote="s3://bucket", cache=str(tmp_path / "cache")))


def epoch(config) -> list[list[int]]:
    with TrainingData(config, 0, 1) as data, validation_batches(config, 0, 1) as validation:
        steps = [data.next_step() for _ in range(data.samples_per_epoch // 8 + 1)]
        return [batch.tokens.tolist() for step in [*steps, validation] for batch in step]


class Flaky:
    """A function that fails `times` times, and from then on does what it did."""

    def __init__(self, monkeypatch, module, name, times, number, only=""):
        self.left, self.calls = times, 0
        self._number, self._only = number, only
        self._real = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __get__(self, instance, owner=None):
        return (lambda *arguments, **named: self(instance, *arguments, **named)) if instance is not None else self

    def __call__(self, *arguments, **named):
        if self._only in str(arguments[0]):
            self.calls += 1
            if self.left:
                self.left -= 1
                raise OSError(self._number, os.strerror(self._number))
        return self._real(*arguments, **named)


# Where each kind of reading meets the disk: of a sample, of a shard's description, of a shard for its hash, of its
# size, of dataset.json, the index and the tokenizer.
_PLACES = [
    (mds.Layout, "read", ""),
    (mds.os, "pread", ""),
    (stores, "file_of", "shard.00001.mds"),
    (Path, "stat", "shard.00001.mds"),
    (Path, "read_bytes", "dataset.json"),
    (Path, "read_bytes", "index.json"),
    (Path, "read_bytes", "tokenizer.json"),
]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
@pytest.mark.parametrize(("module", "name", "only"), _PLACES)
def test_a_disk_that_fails_for_a_moment_is_waited_for(corpus, monkeypatch, caplog, module, name, only, number):
    expected = epoch(corpus[0])
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "megahybrid.retry"):
        flaky = Flaky(patch, module, name, 3, number, only)
        assert epoch(corpus[0]) == expected
    assert flaky.left == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all("Reading '" in line and only in line and "tried again" in line for line in said)


@pytest.mark.parametrize(("module", "name", "only"), _PLACES)
def test_a_disk_that_stays_out_is_the_machines_fault(corpus, monkeypatch, module, name, only):
    monkeypatch.setattr("megahybrid.retry.SECONDS", 0.1)
    with monkeypatch.context() as patch:
        flaky = Flaky(patch, module, name, 10**9, errno.EIO, only)
        with pytest.raises(
            MachineFault, match=rf"^Reading '.*{only}' kept failing for .*; see to that disk or server\.$"
        ):
            epoch(corpus[0])
    assert flaky.calls > 3


@pytest.mark.parametrize(("module", "name", "only"), _PLACES)
def test_what_does_not_pass_is_refused_at_once(corpus, monkeypatch, caplog, module, name, only):
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "megahybrid.retry"):
        Flaky(patch, module, name, 10**9, errno.EACCES, only)
        with pytest.raises(UserError) as error:
            epoch(corpus[0])
    assert not isinstance(error.value, MachineFault) and only in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize("faults", [["error", "busy", "broken", "closed"], ["broken", "closed", "busy", "error"]])
def test_a_server_that_fails_for_a_moment_is_waited_for(corpus, remote, store, caplog, faults):
    store.faults = dict(zip([SHARD, "index.json", "dataset.json", "tokenizer.json"], faults, strict=True))
    store.times = dict.fromkeys(store.faults, 2)
    with caplog.at_level(logging.WARNING, "megahybrid.retry"):
        assert epoch(remote) == epoch(corpus[0])
    assert set(store.times.values()) == {0}
    said = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("The download of 's3://") and "tried again" in line for line in said)
    for name, fault in store.faults.items():
        # The client takes up a broken connection by itself, in part.
        count = sum(f"{name}'" in line for line in said)
        assert count <= 2 if fault == "broken" else count == 2
    assert not [path for path in Path(remote.data.cache).rglob("*") if "part" in path.name]


def test_a_refused_connection_is_waited_for(corpus, remote, store, monkeypatch):
    """The server is not there at first."""
    from botocore.httpsession import URLLib3Session

    real, left = URLLib3Session.send, [3]

    def send(self, request):
        if left[0]:
            left[0] -= 1
            request.url = request.url.replace(store.url, "http://127.0.0.1:1")
        return real(self, request)

    monkeypatch.setattr(URLLib3Session, "send", send)
    assert epoch(remote) == epoch(corpus[0]) and left == [0]


@pytest.mark.parametrize("name", [SHARD, "tokenizer.json"])
def test_a_server_that_stays_out_is_the_machines_fault(remote, store, monkeypatch, name):
    monkeypatch.setattr("megahybrid.retry.SECONDS", 0.2)
    store.faults[name] = "error"
    with pytest.raises(MachineFault, match=rf"^The download of 's3://bucket/.*{name}' kept failing .*\.$"):
        epoch(remote)


def test_what_is_not_there_is_not_waited_for(remote, store, caplog):
    store.faults[SHARD] = "missing"
    with (
        caplog.at_level(logging.WARNING, "megahybrid.retry"),
        pytest.raises(UserError, match="cannot be downloaded") as error,
    ):
        epoch(remote)
    assert not isinstance(error.value, MachineFault) and not caplog.records


def test_a_disk_of_the_cache_that_fails_for_a_moment_is_waited_for(corpus, remote, store, monkeypatch):
    expected = epoch(corpus[0])
    with monkeypatch.context() as patch:
        files = [Flaky(patch, stores.os, "replace", 4, errno.EIO, name) for name in (SHARD, "dataset.json")]
        assert epoch(remote) == expected and not any(flaky.left for flaky in files)
    with monkeypatch.context() as patch:
        flaky = Flaky(patch, mds.os, "pread", 3, errno.ESTALE)
        assert epoch(remote) == expected and flaky.left == 0


def client_error(status: int, code: str) -> Exception:
    from botocore.exceptions import ClientError

    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def test_which_faults_of_a_server_may_pass():
    passing = [
        client_error(500, "InternalError"),
        client_error(503, "SlowDown"),
        client_error(429, "TooManyRequests"),
        client_error(400, "RequestTimeout"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        OSError(errno.ESTALE, "stale"),
        TimeoutError(),
        Exception("anything"),
    ]
    final = [
        client_error(404, "NoSuchKey"),
        client_error(404, "404"),
        client_error(403, "AccessDenied"),
        client_error(400, "ExpiredToken"),
        FileNotFoundError(errno.ENOENT, "no"),
        PermissionError(errno.EACCES, "no"),
        ValueError("no URL"),
        ImportError("no client"),
    ]
    assert not [error for error in passing if _is_final(error)]
    assert not [error for error in final if not _is_final(error)]
    assert not _is_final(Passing("x"))


@pytest.mark.parametrize("kind", [MachineFault, UserError])
def test_all_processes_raise_the_kind_that_one_has_found(monkeypatch, kind):
    """A machine's fault is one on every process, so that whichever writes it down has the job requeued."""

    def gather(found, mine):
        found[:] = [mine, (f"{kind.__name__}.", kind is MachineFault, "", mine[-1])]

    monkeypatch.setattr(loader.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loader.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(loader.dist, "all_gather_object", gather)
    with pytest.raises(UserError) as error:
        loader._on_all_ranks(lambda: "identity")
    assert type(error.value) is kind and str(error.value) == f"{kind.__name__}."


@pytest.mark.parametrize("ours", [UserError("It is not here."), None], ids=["here", "elsewhere"])
def test_nodes_that_do_not_find_the_data_are_named(monkeypatch, ours):
    """Or that find other data; the processes of one node are one."""

    def gather(found, mine):
        theirs = ("It is not here.", False, "", "n2"), ("", False, "theirs", "n3"), ("", False, "identity", "n3")
        found[:] = [mine, *(theirs[:1] if what == "absent" else theirs[1:])]

    def open_data():
        if ours and what == "absent":
            raise ours
        return "identity"

    monkeypatch.setattr(loader.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loader.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(loader.dist, "all_gather_object", gather)
    monkeypatch.setattr(loader.socket, "gethostname", lambda: "n1")
    what = "absent"
    expected = "It is not here." if ours else "It is not here (on n2 only; all nodes need the same data)."
    with pytest.raises(UserError) as error:
        loader._on_all_ranks(open_data)
    assert str(error.value) == expected
    what = "other"
    with pytest.raises(UserError, match=r"\(identity on n1, theirs on n3\)"):
        loader._on_all_ranks(open_data)
