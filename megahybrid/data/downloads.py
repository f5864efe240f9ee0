"""Files from a URL, by mosaicml-streaming's downloaders, with their errors sorted: what may pass and what may not."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

from megahybrid.errors import UserError

# The server may be silent for so long.
_SECONDS = 60.0
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_FINAL_ERRORS = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, shutil.Error, shutil.SpecialFileError,
    ValueError, TypeError, ImportError, AttributeError, LookupError,
)  # fmt: skip
# Statuses and codes among 4xx with which a server asks to come again.
_COME_AGAIN = {408, 425, 429, "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}


class Passing(Exception):
    """A download failed with what may not fail the next time; one line."""


class Downloads:
    """Copies files from below a URL; each thread has a client of its own."""

    def __init__(self, url: str):
        """Raises UserError for a URL of an unknown kind."""
        self._url = url
        self._local = threading.local()
        self._client()

    def get(self, name: str, file: Path) -> None:
        """Write the URL's `name` to a file.

        Raises Passing for what may be tried again, UserError for what may not (404, 403), and OSError where the disk
        that it is written to is at fault.
        """
        try:
            self._client().download(f"{self._url}/{name}", str(file), _SECONDS)
        except Exception as error:  # every kind of store has its own
            if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
                raise
            if not _is_final(error):
                raise Passing(_first_line(error)) from error
            self._local.client = None  # it may have kept what it was refused for
            raise UserError(
                f"'{self._url}/{name}' cannot be downloaded ({_first_line(error)}); check data.remote, its access "
                "rights and the connection."
            ) from error

    def _client(self) -> Any:
        if getattr(self._local, "client", None) is None:
            from streaming.base.storage import CloudDownloader  # takes seconds, and a local folder does not need it

            try:
                self._local.client = CloudDownloader.get(self._url)
            except (ValueError, ImportError) as error:
                raise UserError(
                    f"data.remote '{self._url}' is of no kind that can be read here ({_first_line(error)}); use "
                    "s3://BUCKET/FOLDER or a folder."
                ) from error
        return self._local.client


def is_passing(error: BaseException) -> bool:
    """Whether `Downloads.get` may succeed the next time."""
    return isinstance(error, Passing)


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    kind = type(error).__name__
    if isinstance(error, _FINAL_ERRORS) or any(word in kind for word in ("NotFound", "Credentials", "Validation")):
        return True
    answer = _answer(error)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return 400 <= status < 500 and status not in _COME_AGAIN and _code(error) not in _COME_AGAIN


def _answer(error: Exception) -> dict[str, Any]:
    """What an S3 server answered; empty where it was none."""
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _code(error: Exception) -> str | None:
    return _answer(error).get("Error", {}).get("Code")


def _first_line(error: Exception) -> str:
    code = _code(error)
    text = str(error).strip() if code is None else f"the server answered {code}"
    return " ".join(text.splitlines()[0].rstrip(".").split()) if text else type(error).__name__
