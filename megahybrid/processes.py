"""Processes that work for this one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Any


def answers_to_parent(mode: str) -> IO[Any]:
    """In a process that `start_python` started: its pipe to the parent, to which nothing else writes from now on, since
    what libraries print is no answer."""
    answers = os.fdopen(os.dup(1), mode, encoding=None if "b" in mode else "utf-8")
    os.dup2(2, 1)
    return answers


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
