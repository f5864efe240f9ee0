"""What signals ask of a run."""

import os
import signal

import pytest

from megahybrid.training import signals
from megahybrid.training.signals import StopRequest


def test_the_first_interrupt_is_noted_and_a_later_one_ends_at_once(monkeypatch, capfd):
    before, now = signal.getsignal(signal.SIGINT), iter([0.0, 1.0, 10.0])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, of the same interrupt
        assert request.signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("Interrupted") == 1


def test_the_first_signal_is_the_one_that_is_named():
    with StopRequest() as request:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.signal == "SIGUSR1"
