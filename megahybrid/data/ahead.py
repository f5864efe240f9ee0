"""Work that another process does ahead of time: a thread would take the interpreter from what launches a GPU's work."""

from __future__ import annotations

import contextlib
import fcntl
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any

from megahybrid.errors import MachineFault, UserError
from megahybrid.processes import answers_to_parent, start_python

_ANSWER = 2**20  # bytes; what Linux allows a user's pipe to hold


class Ahead:
    """Calls a function of one argument in another process, a call at a time; it shares nothing with this one and ends
    when this one does.

    Function, arguments and results are pickled. `ask` and `fetch` raise MachineFault if the process died.
    """

    def __init__(self, function: Callable[[Any], Any], does: str):
        """`does`: what it does, for messages."""
        self._function, self._does = function, does
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def ask(self, argument: object) -> None:
        """Have the call begun; the first one starts the process. An answer that was not fetched is waited for and
        forgotten."""
        if self._process is None:
            self._process = start_python("from megahybrid.data.ahead import serve; serve()")
            _widen(self._process.stdout)
            self._send(self._function)
        self._receive()
        self._send(argument)
        self._asked = True

    def fetch(self) -> Any:
        """The answer to what was asked last, once it is there; None if it was fetched, or nothing was asked.

        Raises UserError where the call did, and RuntimeError where it raised anything else.
        """
        answer, error = self._receive()
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise RuntimeError(f"the process that {self._does} failed: {error}")
        return answer

    def close(self) -> None:
        """End the process. What is asked next starts another one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent any more
                pipe.close()
        self._process, self._asked = None, False

    def _receive(self) -> tuple[Any, UserError | str | None]:
        """The answer and the error, both None if nothing is on its way."""
        if not self._asked:
            return None, None
        self._asked = False
        assert self._process is not None and self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):  # none of an answer, or a part
            raise self._dead() from None

    def _send(self, what: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None

    def _dead(self) -> MachineFault:
        assert self._process is not None
        code = self._process.wait()
        return MachineFault(
            f"The process that {self._does} died (exit code {code}); after -9 ask for more memory, and start again."
        )


def _widen(pipe: IO[bytes]) -> None:
    """Have it hold an answer that nobody reads yet, where the system lets it: else who asks waits for a process that
    waits for the rest to be read, and on a busy machine each takes its turn several times."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux; a user's pipes hold too much already
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _ANSWER)


def serve() -> None:
    """The life of the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent's to heed, and it needs this one to
        signal.signal(number, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, answers_to_parent("wb")
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        function, error = _tried(pickle.load, requests)
        while error is None:
            _answer(answers, _tried(function, pickle.load(requests)))
        _answer(answers, (None, error))


def _tried(function: Callable[[Any], Any], argument: Any) -> tuple[Any, UserError | str | None]:
    """What it returns, and what is to be said of what it raises."""
    try:
        return function(argument), None
    except UserError as error:
        return None, error
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {' '.join(str(error).split())}"


def _answer(answers: IO[bytes], answer: tuple[Any, UserError | str | None]) -> None:
    pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
    answers.flush()
