"""Work that another process does ahead of time: a thread would take the interpreter from what launches a GPU's work."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from megahybrid.errors import MachineFault


class Ahead:
    """Calls a function of one argument in another process, a call at a time; it shares nothing with this one and ends
    when this one does.

    Function, arguments and results are pickled.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def ask(self, argument: object) -> None:
        """Have the call begun; the first one starts the process. An answer that was not fetched is forgotten."""
        if self._process is None:
            self._process = start_python("from megahybrid.data.ahead import serve; serve()")
            self._send(self._function)
        self.fetch()
        self._send(argument)
        self._asked = True

    def fetch(self) -> Any:
        """The answer to what was asked last, once it is there; None if it was fetched, or nothing was asked.

        Raises RuntimeError if the call raised, MachineFault if the process died.
        """
        if not self._asked:
            return None
        self._asked = False
        assert self._process is not None and self._process.stdout is not None
        try:
            answer, error = pickle.load(self._process.stdout)
        except EOFError:
            raise self._dead() from None
        if error is not None:
            raise RuntimeError(f"making samples ahead failed: {error}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was not sent any more
                pipe.close()
        self._process = None

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
        return MachineFault(f"The process that makes samples died (exit code {code}); if memory ran out, ask for more.")


def start_python(code: str, *arguments: str, **options: Any) -> subprocess.Popen:
    """A Python that finds the modules that this one finds, with pipes for its input and output, in one thread. options:
    of Popen."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # an interrupt from the terminal is the parent's to handle
        **options,
    )


def serve() -> None:
    """The life of the process."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print is no answer
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        function = pickle.load(requests)
        while True:
            argument = pickle.load(requests)
            try:
                answer = function(argument), None
            except Exception as error:
                traceback.print_exc()
                answer = None, f"{type(error).__name__}: {' '.join(str(error).split())}"
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
