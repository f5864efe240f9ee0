"""A process that works ahead: what it answers, and what is said when it cannot."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest

from megahybrid.data.ahead import Ahead, start_python
from megahybrid.errors import MachineFault


@pytest.fixture
def divide():
    ahead = Ahead(partial(divmod, 17))
    yield ahead
    ahead.close()


def test_the_last_call_is_answered_once(divide):
    assert divide.fetch() is None
    divide.ask(4)
    divide.ask(5)
    assert divide.fetch() == (3, 2)
    assert divide.fetch() is None


def test_a_call_that_raises_is_told_and_the_next_one_answered(divide):
    divide.ask(0)
    with pytest.raises(RuntimeError, match="making samples ahead failed: ZeroDivisionError: "):
        divide.fetch()
    divide.ask(3)
    assert divide.fetch() == (5, 2)


def test_what_is_printed_is_no_answer():
    ahead = Ahead(print)
    ahead.ask("hello")
    assert ahead.fetch() is None
    ahead.close()


def test_a_process_that_died_is_a_fault_of_the_machine():
    ahead = Ahead(partial(os.kill, os.getpid()))
    ahead.ask(0)  # no signal: whether the process that is named here lives
    assert ahead.fetch() is None
    ahead._process.kill()
    with pytest.raises(MachineFault, match=r"died \(exit code -9\); if memory ran out, ask for more"):
        ahead.ask(0)
        ahead.fetch()
    ahead.close()


PARENT = """
import os, time
from megahybrid.data.ahead import Ahead
ahead = Ahead(os.getenv)
ahead.ask("HOME")
ahead.fetch()
print(ahead._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_when_its_parent_is_killed():
    parent = start_python(PARENT, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while lives(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lives(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
