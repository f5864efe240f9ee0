"""Trying again what a file system, a network or a server refused for the moment, and which faults may pass at all."""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from megahybrid.errors import MachineFault, UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SECONDS = 120.0
"""How long one action is tried again; less than any limit of the watchdog that a run would set."""

SECONDS_BESIDE_TRAINING = 900.0
"""How long what goes on beside training, metrics and checkpoints, may fail before it ends the run."""

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


def is_of_a_disk(error: BaseException) -> bool:
    """Whether an error came from the file system, whatever it is: somebody may make room, or mount it again."""
    return isinstance(error, OSError)


def may_succeed(error: BaseException) -> bool:
    """Whether the same start could succeed elsewhere or later: machines, GPUs and links fail, programs do not heal."""
    if isinstance(error, UserError):
        return isinstance(error, MachineFault)
    if is_transient(error) or "gloo/transport" in str(error):  # gloo's lost connections have no type of their own
        return True
    torch = sys.modules.get("torch")  # nothing of it fails where it was not imported
    return torch is not None and isinstance(error, (torch.distributed.DistError, torch.AcceleratorError))


def retry(
    action: Callable[[], Result],
    what: str,
    transient: Callable[[BaseException], bool] = is_transient,
    seconds: float | None = None,
) -> Result:
    """Do `action`, again and again for `seconds` (SECONDS) while it fails with what `transient` takes for passing.

    Any other error is raised at once. Raises MachineFault, from the last error, when the time is over: the machine is
    at fault, and the same start may succeed on another one. `what` begins its sentence, such as "Writing runs/a/x".
    """
    seconds = SECONDS if seconds is None else seconds
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return action()
        except Exception as error:
            if not transient(error):
                raise
            if time.monotonic() + pause > deadline:
                raise MachineFault(
                    f"{what} kept failing for {seconds:.0f} s ({error}); see to that disk or server."
                ) from error
            log.warning("%s failed (%s); it is tried again in %.1f s.", what, error, pause)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


class Patience:
    """With what is written beside training and tried again as it goes on: it may fail for SECONDS_BESIDE_TRAINING."""

    def __init__(self):
        self._since: float | None = None

    def bear(self, what: str, fault: OSError) -> None:
        """Log that `what` could not be written. Raises when that has lasted too long: MachineFault, or UserError for
        what another machine would find as well, such as a full disk.
        """
        now, why = time.monotonic(), fault.strerror or str(fault)
        if self._since is None:
            self._since = now
            log.warning("%s could not be written (%s); training goes on, and it is tried again.", what, why)
        if now - self._since >= SECONDS_BESIDE_TRAINING:
            advice = "see to that disk" if is_transient(fault) else "make room"
            raise (MachineFault if is_transient(fault) else UserError)(
                f"{what} could not be written ({why}); {advice} and start again: training goes on from the checkpoint "
                "before."
            )

    def relax(self) -> None:
        """It was written."""
        self._since = None
