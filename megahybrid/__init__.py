"""Distributed pretraining of hybrid linear + sparse attention language models."""

import functools
import subprocess
from pathlib import Path

__version__ = "0.1.0"

PINNED_VERSION = "code_version.txt"
"""Beside this file in a copy that `submit` has made: the version of what was copied."""


@functools.cache
def code_version() -> str:
    """The version, and in a git checkout its commit, with a + when files were changed; of a submission's copy the
    version of what was copied."""
    folder = Path(__file__).parent
    if (folder / PINNED_VERSION).is_file():
        return (folder / PINNED_VERSION).read_text(encoding="utf-8").strip()
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__} {done.stdout.strip()}".strip() if done.returncode == 0 else __version__
