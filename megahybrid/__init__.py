"""Distributed pretraining of hybrid linear + sparse attention language models."""

import functools
import subprocess
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def code_version() -> str:
    """The version, and in a git checkout its commit, with a + when files were changed."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__} {done.stdout.strip()}".strip() if done.returncode == 0 else __version__
