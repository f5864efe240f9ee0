"""metrics.jsonl over a disk that refuses: lines in order, each once, and an end after the limit. And cut at its end."""

import errno
import io
import json
import os

import pytest

from megahybrid import retry
from megahybrid.errors import MachineFault, UserError
from megahybrid.training import metrics_file
from megahybrid.training.metrics_file import MetricsFile, cut, first_line, lines_after, lines_backwards


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


def lines_of(*numbers) -> str:
    """Of different lengths, some over several of the blocks that `small_blocks` makes."""
    return "".join(json.dumps({"step": number, "kept": [0.5] * (number % 9)}) + "\n" for number in numbers)


@pytest.fixture(params=[1, 7, 64, 2**18])
def small_blocks(request, monkeypatch):
    monkeypatch.setattr(metrics_file, "_BLOCK", request.param)


TAILS = {"whole": "", "torn": '{"step": 31, "tok', "torn within a number": '{"step": 3', "zeros": "\0" * 200}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("step", [1, 17, 29, 30, 99])
def test_what_comes_after_a_step_is_cut(step, tail, path, small_blocks):
    path.write_text(lines_of(*range(1, 31)) + tail)
    cut(path, step)
    assert path.read_text() == lines_of(*range(1, min(step, 30) + 1))
    file = MetricsFile(path)
    file.add({"step": step + 1})
    assert steps(path) == [*range(1, min(step, 30) + 1), step + 1]


@pytest.mark.parametrize("content", ["", lines_of(8, 9), '{"step": 8', "\n\n"], ids=["empty", "later", "torn", "blank"])
def test_where_every_line_is_later_none_stays(content, path, small_blocks):
    path.write_text(content)
    cut(path, 7)
    assert path.read_bytes() == b""


def test_a_last_line_without_an_end_gets_one(path, small_blocks):
    """As an editor may leave it."""
    path.write_text(lines_of(1, 2, 3).rstrip("\n"))
    cut(path, 3)
    assert path.read_text() == lines_of(1, 2, 3)


def test_cutting_reads_no_more_than_it_removes(path, monkeypatch):
    """Of ten megabytes a block, where the checkpoint is a few steps back."""
    path.write_text("".join(json.dumps({"step": number, "kept": "0" * 1000}) + "\n" for number in range(10_000)))
    real, read = io.BufferedRandom.read, []

    class Counting(io.BufferedRandom):
        def read(self, size=-1):
            read.append(size)
            return real(self, size)

    monkeypatch.setattr("builtins.open", lambda file, mode: Counting(io.FileIO(file, mode.replace("b", ""))))
    cut(path, 9_990)
    monkeypatch.undo()
    assert read == [metrics_file._BLOCK]
    assert steps(path)[-2:] == [9_989, 9_990]


def test_lines_from_both_ends(path, small_blocks):
    path.write_text(lines_of(*range(1, 31)) + '{"step": 31')
    assert [line["step"] for line in lines_backwards(path)] == list(range(30, 0, -1))
    for step in (0, 1, 12, 30):
        assert [line["step"] for line in lines_after(path, step)] == list(range(step + 1, 31))


def test_the_first_line_is_the_first_that_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text, found in (("", {}), ('{"step": 1', {}), ('{"st\n\n{"step": 2}\n{"step": 3}\n', {"step": 2})):
        path.write_text(text)
        assert first_line(path) == found
