"""Where prepared data lies: in a folder, or at a URL with a cache in front of it. Whole files or a named fault."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from megahybrid.errors import UserError

HASH = "xxh64"

# A download that fails is tried again after so many seconds each.
_PAUSES = (1.0, 4.0)
# The server may be silent for so long.
_DOWNLOAD_SECONDS = 60.0
# A process that waits for another's download gives up after this; the lock of a dead process is free at once.
_LOCK_SECONDS = 600.0
_LOCKS = 64
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


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
        """What is wrong with the file at `path`, as the end of a sentence; empty if nothing is."""
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"has {size} bytes, not {self.bytes}"
            found = file_of(path, self.name)
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
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
    """What readers need."""

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

    def touch(self, file: File) -> None:
        """Note that a file is in use."""

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
                size = (self.root / file.name).stat().st_size
            except OSError:
                raise UserError(self._damaged(file.name, "is missing")) from None
            if size != file.bytes:
                raise UserError(self._damaged(file.name, f"has {size} bytes, not {file.bytes}"))

    def read(self, name: str, sha256: str | None) -> bytes:
        """See Store."""
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(self._damaged(name, "is missing or unreadable")) from error
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(self._damaged(name, "is not the one that dataset.json names"))
        return data

    def fetch(self, file: File) -> None:
        """See Store."""
        if fault := file.fault(self.root / file.name):
            raise UserError(self._damaged(file.name, fault))

    def touch(self, file: File) -> None:
        """Nothing is ever thrown out."""

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
        self._local = threading.local()
        self._downloader()

    def check_sizes(self, files: list[File]) -> None:
        """Nothing: what is in the cache and not whole is fetched again."""

    def read(self, name: str, sha256: str | None) -> bytes:
        """See Store. Without a hash the file is fetched anew, since nothing says that the cached one is the newest."""
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

    def fetch(self, file: File) -> None:
        """See Store."""
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

    def touch(self, file: File) -> None:
        """See Store."""
        with contextlib.suppress(OSError):  # thrown out just now: it will be fetched again
            os.utime(self.root / file.name)

    def describe(self, name: str) -> str:
        """See Store."""
        return f"'{self._url}/{name}'"

    def remedy(self) -> str:
        """See Store."""
        return "copy the prepared data there again"

    def _damaged(self, name: str, fault: str) -> str:
        return f"{self.describe(name)} {fault}; {self.remedy()}."

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache '{self._cache}' cannot be written: {error.strerror or error}; make room, set "
                "data.cache_limit or choose another."
            ) from error

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        locks = self._cache / ".locks"
        locks.mkdir(exist_ok=True)
        # A lock may stand for several files: one a shard would litter the cache.
        with open(locks / str(zlib.crc32(f"{self._url}/{name}".encode()) % _LOCKS), "w") as lock:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise UserError(
                            f"Another process has been fetching {self.describe(name)} for {_LOCK_SECONDS:g} s; "
                            "check the connection and start again."
                        ) from None
                time.sleep(0.02)
            yield

    def _download(self, name: str) -> Path:
        """Fetch a file beside its place in the cache; the caller holds its lock."""
        path = self.root / name
        part = path.with_name(f".{path.name}.part")
        pauses = iter(_PAUSES)
        while True:
            for left in path.parent.glob(f"{part.name}*"):  # of a killed process; some downloaders add letters
                left.unlink(missing_ok=True)
            try:
                self._downloader().download(f"{self._url}/{name}", str(part), _DOWNLOAD_SECONDS)
                return part
            except Exception as error:  # every kind of store has its own
                if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
                    raise
                pause = next(pauses, None)
                if pause is None or _is_final(error):
                    self._local.downloader = None
                    raise UserError(
                        f"{self.describe(name)} cannot be downloaded ({_first_line(error)}); check data.remote, its "
                        "access rights and the connection."
                    ) from error
            time.sleep(pause)

    def _downloader(self) -> Any:
        """This thread's client."""
        if getattr(self._local, "downloader", None) is None:
            from streaming.base.storage import CloudDownloader  # takes seconds, and a local folder does not need it

            try:
                self._local.downloader = CloudDownloader.get(self._url)
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"data.remote '{self._url}' is of no kind that can be read here ({_first_line(error)}); use "
                    "s3://BUCKET/FOLDER or a folder."
                ) from error
        return self._local.downloader

    def _make_room(self, size: int) -> None:
        """Throw out the shards that were not used for longest until another one fits."""
        if self._limit is None:
            return
        with open(self._cache / ".locks" / "room", "w") as lock:
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


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return True
    final = {"403", "404", "NoSuchKey", "NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
    return _code(error) in final or "Credentials" in type(error).__name__


def _code(error: Exception) -> str | None:
    """What an S3 server answered."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code")) if isinstance(response, dict) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip() if _code(error) is None else f"the server answered {_code(error)}"
    return " ".join(text.splitlines()[0].rstrip(".").split()) if text else type(error).__name__
