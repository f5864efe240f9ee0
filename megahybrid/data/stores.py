"""Where prepared data lies: in a folder, or at a URL with a cache in front of it. Whole files or a named fault."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import xxhash

from megahybrid.data.downloads import Downloads, is_passing
from megahybrid.data.mds import HASH
from megahybrid.errors import MachineFault, UserError
from megahybrid.retry import is_transient, retry

# A process that waits for another's download gives up after this; the lock of a dead process is free at once.
_LOCK_SECONDS = 600.0
_LOCKS = 64


@dataclass(frozen=True)
class File:
    """A file of prepared data as its index describes it."""

    name: str
    """Path below data.path, with forward slashes."""
    bytes: int
    """Its size."""
    xxh64: str
    """Its hash."""

    def fault(self, path: Path) -> str:
        """What is wrong with the file at `path`, as the end of a sentence; empty if nothing is.

        Raises OSError for a fault of the disk that may pass.
        """
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"has {size} bytes, not {self.bytes}"
            found = file_of(path, self.name)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            if is_transient(error):
                raise
            return f"cannot be read ({error.strerror})"
        return "" if found == self else f"does not match its {HASH} hash"


def file_of(path: Path, name: str) -> File:
    """Describe a file as it is."""
    digest, size = xxhash.xxh64(), 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 22):
            digest.update(part)
            size += len(part)
    return File(name, size, digest.hexdigest())


class Store(Protocol):
    """What readers need. Faults of disks and connections are waited for, then raised as MachineFault."""

    root: Path
    """Where files lie once they are fetched."""
    threads: int
    """How many to fetch at once."""

    def check_sizes(self, files: list[File]) -> None:
        """Raises UserError for a file that is there and cannot be whole, or is not and cannot be fetched."""

    def read(self, name: str, sha256: str | None) -> bytes:
        """A small file's content; its hash is compared if given. Raises UserError."""

    def fetch(self, file: File) -> None:
        """Returns once the file is there and whole. Raises UserError if it cannot be."""

    def touch(self, file: File) -> bool:
        """Note that a file is in use; whether it is (still) there."""

    def describe(self, name: str) -> str:
        """A file in messages."""

    def remedy(self) -> str:
        """What to do about a damaged file, as the end of a sentence."""


class Folder:
    """Prepared data in data.path."""

    threads = 1

    def __init__(self, root: Path):
        self.root = root

    def check_sizes(self, files: list[File]) -> None:
        """Compare every file's size; their hashes are compared when they are first read from."""
        for file in files:
            try:
                size = retry((self.root / file.name).stat, f"Reading {self.describe(file.name)}").st_size
            except FileNotFoundError:
                raise UserError(self._damaged(file.name, "is missing")) from None
            except OSError as error:
                raise UserError(self._damaged(file.name, f"cannot be read ({error.strerror})")) from error
            if size != file.bytes:
                raise UserError(self._damaged(file.name, f"has {size} bytes, not {file.bytes}"))

    def read(self, name: str, sha256: str | None) -> bytes:
        """See Store."""
        try:
            data = retry((self.root / name).read_bytes, f"Reading {self.describe(name)}")
        except OSError as error:
            raise UserError(self._damaged(name, "is missing or unreadable")) from error
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(self._damaged(name, "is not the one that dataset.json names"))
        return data

    def fetch(self, file: File) -> None:
        """See Store."""
        if fault := retry(lambda: file.fault(self.root / file.name), f"Reading {self.describe(file.name)}"):
            raise UserError(self._damaged(file.name, fault))

    def touch(self, file: File) -> bool:
        """Nothing is ever thrown out."""
        return True

    def describe(self, name: str) -> str:
        """See Store."""
        return f"'{self.root / name}'"

    def remedy(self) -> str:
        """See Store."""
        return "remove the data folder and run `megahybrid prepare` again"

    def _damaged(self, name: str, fault: str) -> str:
        return f"{self.describe(name)} {fault}; {self.remedy()}."


class Remote:
    """Prepared data at data.remote, cached in a folder that the processes of a node, and other jobs, share.

    A file appears in the cache in one rename, after its size and hash have been compared. Locks are the kernel's, so
    that a killed process leaves nothing behind but a part that the next one removes.
    """

    threads = 4

    def __init__(self, url: str, cache: Path, limit: int | None = None):
        """`limit`: bytes of shards that the cache may hold. Raises UserError for a URL of an unknown kind."""
        self._url = url.rstrip("/")
        self._cache = cache
        self._limit = limit
        self.root = cache / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self._downloads = Downloads(self._url)

    def check_sizes(self, files: list[File]) -> None:
        """Nothing: what is in the cache and not whole is fetched again."""

    def read(self, name: str, sha256: str | None) -> bytes:
        """See Store. Without a hash the file is fetched anew, since nothing says that the cached one is the newest."""
        return retry(lambda: self._read(name, sha256), f"Fetching {self.describe(name)}")

    def fetch(self, file: File) -> None:
        """See Store."""
        retry(lambda: self._fetch(file), f"Fetching {self.describe(file.name)}")

    def touch(self, file: File) -> bool:
        """See Store."""
        try:
            os.utime(self.root / file.name, follow_symlinks=False)
        except FileNotFoundError:  # thrown out just now: it will be fetched again
            return False
        except OSError:
            pass
        return True

    def describe(self, name: str) -> str:
        """See Store."""
        return f"'{self._url}/{name}'"

    def remedy(self) -> str:
        """See Store."""
        return "copy the prepared data there again"

    def _damaged(self, name: str, fault: str) -> str:
        return f"{self.describe(name)} {fault}; {self.remedy()}."

    def _read(self, name: str, sha256: str | None) -> bytes:
        path = self.root / name
        with self._writing():
            with contextlib.suppress(OSError):
                data = path.read_bytes()
                if sha256 is not None and hashlib.sha256(data).hexdigest() == sha256:
                    return data
            with self._locked(name):
                part = self._download(name)
                data = part.read_bytes()
                if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
                    part.unlink()
                    raise UserError(self._damaged(name, "is not the one that its dataset.json names"))
                os.replace(part, path)
        return data

    def _fetch(self, file: File) -> None:
        path = self.root / file.name
        if not file.fault(path):
            self.touch(file)
            return
        with self._writing(), self._locked(file.name):
            if not file.fault(path):  # another process was faster
                return
            path.unlink(missing_ok=True)
            self._make_room(file.bytes)
            part = self._download(file.name)
            if fault := file.fault(part):  # perhaps only on the way
                part.unlink()
                part = self._download(file.name)
                fault = file.fault(part)
            if fault:
                part.unlink(missing_ok=True)
                raise UserError(self._damaged(file.name, fault))
            os.replace(part, path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if is_transient(error):
                raise
            raise UserError(
                f"data.cache '{self._cache}' cannot be written: {error.strerror or error}; make room, set "
                "data.cache_limit or choose another."
            ) from error

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._folder((self.root / name).parent)
        # A lock may stand for several files: one a shard would litter the cache.
        with self._lock_file(str(zlib.crc32(f"{self._url}/{name}".encode()) % _LOCKS)) as lock:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise MachineFault(
                            f"Another process has been fetching {self.describe(name)} for {_LOCK_SECONDS:g} s; "
                            "check the connection and start again."
                        ) from None
                time.sleep(0.02)
            yield

    def _lock_file(self, name: str) -> IO[str]:
        locks = self._folder(self._cache / ".locks")
        return open(locks / name, "w", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))

    def _folder(self, path: Path) -> Path:
        """Make a folder of the cache; refused if a link on the way leads out of it."""
        if path.resolve() != self._cache.resolve() / path.relative_to(self._cache):
            raise UserError(f"'{path}' leads out of data.cache '{self._cache}' by a link; remove it.")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _download(self, name: str) -> Path:
        """Fetch a file beside its place in the cache; the caller holds its lock."""
        path = self.root / name
        part = path.with_name(f".{path.name}.part")

        def download() -> None:
            for left in path.parent.glob(f"{part.name}*"):  # of a killed process; some downloaders add letters
                left.unlink(missing_ok=True)
            self._downloads.get(name, part)

        retry(download, f"The download of {self.describe(name)}", is_passing)
        return part

    def _make_room(self, size: int) -> None:
        """Throw out the shards that were not used for longest until another one fits."""
        if self._limit is None:
            return
        with self._lock_file("room") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = []
            for path in self._cache.rglob("*.mds"):
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    found.append((facts.st_mtime_ns, facts.st_size, path))
            used = sum(bytes_ for _, bytes_, _ in found)
            for _, bytes_, path in sorted(found):
                if used + size <= self._limit:
                    break
                path.unlink(missing_ok=True)
                used -= bytes_
