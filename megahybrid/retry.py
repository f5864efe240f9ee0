"""Trying again what a file system, a network or a server refused for the moment."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from megahybrid.errors import MachineFault

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SECONDS = 120.0
"""How long one action is tried again; less than any limit of the watchdog that a run would set."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
_TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "EIO", "EINTR", "ENETDOWN",
        "ENETRESET", "ENETUNREACH", "EPIPE", "EREMOTEIO", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether the same action may succeed a little later: a stale handle, a lost connection, an I/O error."""
    if isinstance(error, OSError):
        return error.errno in _TRANSIENT or isinstance(error, (ConnectionError, TimeoutError))
    return False


def retry(action: Callable[[], Result], what: str, transient: Callable[[BaseException], bool] = is_transient) -> Result:
    """Do `action`, again and again for `SECONDS` while it fails with what `transient` takes for a passing fault.

    Any other error is raised at once. Raises MachineFault when the time is over: the machine is at fault, and the same
    start may succeed on another one. `what` begins its sentence, such as "Writing runs/a/metrics.jsonl".
    """
    deadline, pause = time.monotonic() + SECONDS, _FIRST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            if not transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise MachineFault(
                    f"{what} kept failing for {SECONDS:.0f} s ({error}); see to that disk or server."
                ) from error
            log.warning("%s failed (%s); it is tried again in %.1f s.", what, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
