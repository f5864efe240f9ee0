"""A folder that is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.files import sync_folder


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    Raises UserError where the target is not new or empty, and where the disk does not take the folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{target}' exists and is not an empty folder; give another one or remove it.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
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
