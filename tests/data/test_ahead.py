"""A process that works ahead: what it answers, and what is said when it cannot."""

from __future__ import annotations

import fcntl
import signal
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest

from megahybrid.data.ahead import Ahead
from megahybrid.errors import MachineFault, UserError
from megahybrid.processes import start_python
from megahybrid.tasks.haystack import prose


@pytest.fixture
def divide():
    ahead = Ahead(partial(divmod, 17), "divides")
    yield ahead
    ahead.close()


def test_the_last_call_is_answered_once(divide):
    assert divide.fetch() is None
    divide.ask(0)  # forgotten, error and all
    divide.ask(5)
    assert divide.fetch() == (3, 2)
    assert divide.fetch() is None


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="pipes of a fixed size")
def test_an_answer_of_many_bytes_is_there_before_it_is_fetched():
    ahead, size = Ahead(bytes, "makes zeros"), 500_000
    ahead.ask(size)
    there, deadline = bytearray(4), time.monotonic() + 60
    while int.from_bytes(there, sys.byteorder) < size:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        fcntl.ioctl(ahead._process.stdout, termios.FIONREAD, there)
    assert ahead.fetch() == bytes(size)
    ahead.close()


def test_a_closed_one_has_forgotten_what_it_was_asked(divide):
    divide.ask(4)
    divide.close()
    assert divide.fetch() is None
    divide.ask(5)
    assert divide.fetch() == (3, 2)


def test_a_call_that_raises_is_told_and_the_next_one_answered(divide):
    divide.ask(0)
    with pytest.raises(RuntimeError, match="the process that divides failed: ZeroDivisionError: "):
        divide.fetch()
    divide.ask(3)
    assert divide.fetch() == (5, 2)


def test_what_the_user_is_to_be_told_is_raised_as_it_is():
    ahead = Ahead(prose, "reads")
    ahead.ask("/nowhere")
    with pytest.raises(UserError, match=r"^The haystack '/nowhere' cannot be read: No such file or directory; "):
        ahead.fetch()
    ahead.close()


def test_a_function_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "lost", lambda x: x, raising=False)
    lost = sys.modules[__name__].lost
    lost.__qualname__ = "lost"
    ahead = Ahead(lost, "is lost")
    ahead.ask(1)
    with pytest.raises(RuntimeError, match=r"the process that is lost failed: AttributeError: .*'lost'"):
        ahead.fetch()
    ahead.close()


def test_what_is_printed_is_no_answer(capfd):
    ahead = Ahead(partial(print, flush=True), "prints")
    for word in ("hello", "again"):
        ahead.ask(word)
        assert ahead.fetch() is None
    ahead.close()
    assert capfd.readouterr() == ("", "hello\nagain\n")


def test_signals_are_its_parents_to_heed(divide):
    divide.ask(4)
    assert divide.fetch() == (4, 1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        divide._process.send_signal(number)
    divide.ask(5)
    assert divide.fetch() == (3, 2)


@pytest.mark.parametrize("size", [1, 10_000_000])  # none of an answer, and a part of one
def test_a_process_that_died_is_a_fault_of_the_machine(size):
    ahead = Ahead(bytes, "makes bytes")
    ahead.ask(size)
    if size == 1:
        assert ahead.fetch() == b"\0"
        ahead.ask(0)
        ahead.fetch()
    else:
        time.sleep(0.5)  # it waits for room in the pipe
    ahead._process.kill()
    with pytest.raises(MachineFault, match=r"^The process that makes bytes died \(exit code -9\); after -9 ask for"):
        ahead.ask(0)
        ahead.fetch()
    ahead.close()


PARENT = """
import time
from megahybrid.data.ahead import Ahead
ahead = Ahead(bytes, "makes bytes")
ahead.ask(10_000_000)  # more than a pipe holds
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
