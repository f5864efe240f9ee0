"""What other starts have left says nothing about this one, and a disk that refuses keeps no hang from being ended."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from megahybrid.config.schema import WatchConfig
from megahybrid.training import failures, watchdog
from megahybrid.training.run_directory import RunDirectory


@pytest.fixture
def ended(monkeypatch):
    """The exit codes with which the process would have been ended."""
    codes = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(watchdog, "_SECONDS_BETWEEN_HEARTBEATS", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return codes


def of_start(monkeypatch, path, restart: int) -> RunDirectory:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    return RunDirectory(path)


def wait_for(ended) -> None:
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)


def test_files_of_another_start_end_nothing(ended, tmp_path, monkeypatch):
    """Also of one whose last process comes to its end only now."""
    before, now = of_start(monkeypatch, tmp_path, 0), of_start(monkeypatch, tmp_path, 1)
    with watchdog.Watchdog(now, WatchConfig(step_seconds=60), 0, grace=0.01) as watch:
        alarm = watch._alarm
        for name in ("stuck", "stuck-7-0"):
            (before.heartbeats / name).touch()
        watch.beat(1)
        time.sleep(0.2)
        assert not ended and (before.heartbeats / "stuck-7-0").exists()
        alarm.touch()
        wait_for(ended)
    assert ended == [1]


def test_the_end_of_what_holds_the_interpreter_follows_the_last_beat_which_starts_no_thread(
    ended, tmp_path, monkeypatch
):
    armed = []

    def arm(seconds, **_):
        armed.append((threading.current_thread(), time.monotonic() + seconds))

    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", arm)
    limits = WatchConfig(start_seconds=1000, step_seconds=60)
    with watchdog.Watchdog(of_start(monkeypatch, tmp_path, 0), limits, 0, grace=1) as watch:
        for long, seconds in ((True, 1000), (False, 60), (True, 1000)):
            watch.beat(1, long=long)
            armed.clear()
            deadline = time.monotonic() + 20
            while len(armed) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert abs(armed[-1][1] - watch._since - seconds - 31) < 0.1
            assert {thread for thread, _ in armed} == {watch._thread}
    assert not ended


def test_the_cause_names_places_of_this_start_only(tmp_path, monkeypatch):
    run = of_start(monkeypatch, tmp_path, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run.heartbeats.mkdir()
    for rank, start in enumerate(("7-0", "7-1")):
        beat = {"rank": rank, "host": "n1", "start": start, "step": 5, "doing": "training", "place": "here"}
        (run.heartbeats / f"rank_{rank:05d}.json").write_text(json.dumps(beat))
    assert watchdog.places(run) == "rank 1 on n1: step 5, training, at here"


@pytest.mark.parametrize("refused", ["touch", "write_text", "stat"])
def test_a_hang_is_ended_on_a_disk_that_refuses(refused, ended, tmp_path, monkeypatch):
    run = of_start(monkeypatch, tmp_path, 0)
    monkeypatch.setattr(failures, "_SECONDS_TO_WRITE", 0.0)
    with watchdog.Watchdog(run, WatchConfig(step_seconds=0.2), 0, grace=0.01) as watch:
        watch.beat(5)

        def refuse(*arguments, **others):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        monkeypatch.setattr(Path, refused, refuse)
        wait_for(ended)
        monkeypatch.undo()
    assert ended == [1]
