"""What both conversions write by: a folder that is whole or absent, and a word now and then of how far it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from megahybrid.errors import UserError
from megahybrid.files import sync_folder

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    Raises UserError where the target is not new or empty, and where the disk does not take the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not an empty folder; give another one or remove it.")
    # A job that was killed finds its own part when it comes again, and nobody else's.
    owner = os.environ.get("MEGAHYBRID_SUBMISSION", os.getpid())
    part = target.with_name(f".{target.name}.{owner}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        if target.exists():
            target.rmdir()
        os.replace(part, target)
        sync_folder(target.parent)
    except OSError as fault:
        raise UserError(
            f"'{target}' could not be written ({fault.strerror or fault}); make room or give another folder: "
            "nothing was left there."
        ) from fault
    finally:
        shutil.rmtree(part, ignore_errors=True)


def told(tensors: Iterable[Tensor], report: Callable[[str], None]) -> Iterator[Tensor]:
    """The tensors, with a line every few seconds of how much has gone through."""
    last, done = time.monotonic(), 0
    for tensor in tensors:
        done += tensor.nbytes
        yield tensor
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            report(f"{done / 1e9:.1f} GB written")
