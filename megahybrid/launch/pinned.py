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
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    write_text(folder / megahybrid.__name__ / megahybrid.PINNED_VERSION, version + "\n")
