"""Which failures are worth another try, after what pause, and what to do about the others."""

from __future__ import annotations

import errno
import os

from v2v_async.errors import RequestError

# Asking again helps where the cause may pass. A full disk, a refused or an impossible request stay.
RETRYABLE = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.ENOMEM,
        errno.ETIMEDOUT,
        errno.ESHUTDOWN,
    }
)
CANNOT = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EOVERFLOW})
"""What a server answers that has no fast way, or no way, to make zeroes."""
HINTS = {
    errno.ENOSPC: "make room on the target, then run it again",
    errno.EDQUOT: "the target's quota is used up: raise it, then run it again",
    errno.EIO: "the storage behind that server fails: its log, or the kernel's, says more",
    errno.EPERM: "the server does not allow it: was it started read-only?",
    errno.EROFS: "the server does not allow it: was it started read-only?",
}
"""What a person can do about a request that failed for good, by errno."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 5.0
_FIRST_RECONNECT_S = 0.25


def pause(attempt: int) -> float:
    """Return seconds to wait before the attempt after ``attempt`` (from 1) failed ones."""
    return float(min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LAST_PAUSE_S))


def refused(op: str, offset: int, length: int, code: int) -> RequestError:
    """Return the error of a request that was answered with ``code``."""
    name = errno.errorcode.get(code, str(code))
    return RequestError(
        op, offset=offset, length=length, reason=f"{os.strerror(code)} ({name})", errno=code
    )


class Attempts:
    """Counts failures of a disk's connections as long as nothing has come of the last attempts.

    ``landed`` and ``flushed`` count what has; a target that was lost before takes it all back, so
    that only a flush counts then.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.failures = 0
        self._seen = (0, 0)

    def next_pause(self, landed: int, flushed: int, *, had_loss: bool) -> float | None:
        """Return seconds to wait before the next attempt, None when there have been enough."""
        if flushed > self._seen[1] or (not had_loss and landed > self._seen[0]):
            self.failures = 0
        self.failures += 1
        if self.failures > self.most:
            return None
        return float(min(_FIRST_RECONNECT_S * 2 ** (self.failures - 1), _LAST_PAUSE_S))

    def begin(self, landed: int, flushed: int) -> None:
        """Count only what comes of the attempt that begins now."""
        self._seen = (landed, flushed)
