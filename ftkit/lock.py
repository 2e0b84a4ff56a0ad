"""One writer of a run's directory at a time.

The lock is flock's, on the run's train.log: the kernel releases it when the process ends, whatever it dies of, so a
killed run needs no tidying up before it is resumed, and the directory holds no file that only the lock needs.
"""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from ftkit.errors import UserError

TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
"""How flock says that another process holds the lock."""


class RunLock:
    """The right to write to a run's directory, from `take` until `release` or the end of the process."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, log: Path, warn: Callable[[str], None]) -> None:
        """Lock the run whose train.log is `log`; an empty one is created where it has none.

        Args:
            warn: told where the file system knows no locks; the run then goes on without.

        Raises:
            UserError: another process holds the lock.
        """
        self.release()
        self._descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in TAKEN:
                warn(f"{log} cannot be locked ({error.strerror}): start no second process for this run")
                return
            self.release()
            raise UserError(
                f"{log.parent} is being trained by another process",
                how="wait until it ends, or choose another output_dir",
            ) from None

    def release(self) -> None:
        """Let others write."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def refuse_if_locked(log: Path) -> None:
    """Check that nobody writes to the run whose train.log is `log`.

    Raises:
        UserError: another process does.
    """
    if log.exists():
        lock = RunLock()
        lock.take(log, warn=lambda text: None)
        lock.release()
