"""metrics.jsonl over a disk that refuses: lines in order, each once, and an end after the limit."""

import errno
import io
import json
import os

import pytest

from megahybrid import retry
from megahybrid.errors import MachineFault, UserError
from megahybrid.training.metrics_file import MetricsFile


class FaultyDisk:
    """os.open and files' writes that fail as often as told, the latter after `taken` bytes."""

    def __init__(self, monkeypatch):
        self.opens, self.writes, self.taken, self.number = 0, 0, 0, errno.ESTALE
        real_open, real_fdopen, disk = os.open, io.open, self

        def refusing_open(*arguments):
            if disk.opens:
                disk.opens -= 1
                raise OSError(disk.number, os.strerror(disk.number))
            return real_open(*arguments)

        class Refusing(io.FileIO):
            def write(self, data):
                if disk.writes:
                    disk.writes -= 1
                    super().write(bytes(data)[: disk.taken])
                    raise OSError(disk.number, os.strerror(disk.number))
                return super().write(data)

        def fdopen(file, mode, *others, **more):
            if isinstance(file, int) and mode == "wb":
                return io.BufferedWriter(Refusing(file, mode))
            return real_fdopen(file, mode, *others, **more)

        monkeypatch.setattr(os, "open", refusing_open)
        monkeypatch.setattr("builtins.open", fdopen)


@pytest.fixture
def disk(monkeypatch):
    return FaultyDisk(monkeypatch)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n')
    return path


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("taken", [0, 5, 10**6], ids=["nothing", "a part", "all"])
def test_lines_wait_until_the_disk_takes_them(taken, path, disk):
    """A write that failed may have left nothing, a torn line, or everything."""
    file = MetricsFile(path)
    file.add({"step": 2})
    disk.opens = 2
    file.add({"step": 3})
    file.add({"step": 4})
    assert steps(path) == [1, 2]
    disk.writes, disk.taken = 1, taken
    file.add({"step": 5})
    file.add({"step": 6})
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_the_first_write_may_be_torn(path, disk):
    file = MetricsFile(path)
    disk.writes, disk.taken = 1, 5
    file.add({"step": 2})
    file.write()
    assert steps(path) == [1, 2]


def test_what_waits_is_asked_for(path, disk):
    """Before a checkpoint becomes current: its lines would be lost with this process."""
    file = MetricsFile(path)
    disk.opens = 2
    file.add({"step": 2})
    with pytest.raises(OSError, match="Stale file handle"):
        file.write()
    file.write()
    assert steps(path) == [1, 2]


def test_a_file_that_was_taken_away_is_made_anew(path):
    file = MetricsFile(path)
    file.add({"step": 2})
    path.unlink()
    file.add({"step": 3})
    assert steps(path) == [3]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, MachineFault), (errno.ENOSPC, UserError), (errno.EDQUOT, UserError)]
)
def test_after_the_limit_the_run_ends(number, kind, path, disk, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    file = MetricsFile(path)
    disk.number, disk.opens = number, 10**6
    file.add({"step": 2})
    now[0] += retry.SECONDS_BESIDE_TRAINING - 1
    file.add({"step": 3})
    now[0] += 2
    with pytest.raises(UserError, match=r"metrics.jsonl could not be written \(") as ended:
        file.add({"step": 4})
    assert type(ended.value) is kind and os.strerror(number) in str(ended.value)


def test_the_limit_counts_from_the_last_success(path, disk, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    file = MetricsFile(path)
    for step in range(2, 6):
        disk.opens = step % 2
        file.add({"step": step})
        now[0] += retry.SECONDS_BESIDE_TRAINING - 1
    file.write()
    assert steps(path) == [1, 2, 3, 4, 5]
