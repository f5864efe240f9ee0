import errno
import os

import pytest

from megahybrid import retry
from megahybrid.errors import MachineFault


class Flaky:
    """Fails `times` times with `number`, then gives 7."""

    def __init__(self, times, number):
        self.left, self.number, self.calls = times, number, 0

    def __call__(self):
        self.calls += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return 7


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.002)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ECONNREFUSED])
def test_what_passes_is_tried_again(number):
    action = Flaky(3, number)
    assert retry.retry(action, "Reading a file") == 7
    assert action.calls == 4


def test_what_does_not_pass_is_raised_at_once():
    action = Flaky(1, errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        retry.retry(action, "Reading a file")
    assert action.calls == 1


def test_after_the_limit_the_machine_is_at_fault(monkeypatch):
    monkeypatch.setattr(retry, "SECONDS", 0.01)
    with pytest.raises(MachineFault, match=r"Reading a file kept failing .*Stale file handle"):
        retry.retry(Flaky(10**6, errno.ESTALE), "Reading a file")
