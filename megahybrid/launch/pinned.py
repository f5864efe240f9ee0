"""A submission's code: a copy of the packages that its jobs run, whatever becomes of checkout and installation."""

from __future__ import annotations

import shutil
from pathlib import Path

import megahybrid
import megahybrid_kernels
from megahybrid.files import write_text


def pin(folder: Path) -> None:
    """Copy both packages, as they are now, into `folder`, which becomes the only entry that PYTHONPATH needs."""
    version = megahybrid.code_version()
    for package in (megahybrid, megahybrid_kernels):
        source = Path(package.__file__).parent
        copy = folder / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        copy.chmod(0o755)  # of an installation that nobody may write to
    write_text(folder / megahybrid.__name__ / megahybrid.PINNED_VERSION, version + "\n")
