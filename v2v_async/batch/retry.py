"""Which failures are worth another attempt, and when."""

from __future__ import annotations

import errno

from v2v_async.batch.plan.model import Retries
from v2v_async.batch.record.journal import Failure
from v2v_async.errors import (
    ConversionError,
    DependencyError,
    GuestChangedError,
    NotBuiltError,
    UsageError,
    V2VError,
    leaves,
)

_PERMANENT = (UsageError, NotBuiltError, DependencyError, ConversionError, GuestChangedError)
"""The next attempt would meet the same: a wrong plan, a missing program, a guest that virt-v2v
can't convert, or that has other disks now."""

_FULL_OR_FORBIDDEN = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPERM, errno.EACCES, errno.EROFS)
)


def named(error: Exception) -> V2VError:
    """Return an error of a guest as one for a person; of several, the first that says most."""
    if isinstance(error, V2VError):
        return error
    found = [each for each in leaves(error) if isinstance(each, V2VError)]
    if not found and isinstance(error, OSError) and error.errno in _FULL_OR_FORBIDDEN:
        where = f"‘{error.filename}’: " if error.filename else ""
        made = V2VError(
            f"{where}{error.strerror}",
            hint="free space there, or set TMPDIR to another directory",
        )
        made.__cause__ = error
        return made
    if not found:
        made = V2VError(
            f"internal error: {type(error).__name__}: {error}",
            hint="this is a bug in v2v-async, please report it with the guest's bundle",
        )
        made.__cause__ = error
        return made
    first, *others = found
    if others:
        first.message += "".join(f"; also: {each.message}" for each in others)
    return first


def failure_of(error: V2VError) -> Failure:
    """Return what the journal keeps of an error."""
    return Failure(
        message=error.message,
        hint=error.hint,
        step=error.step,
        disk=error.disk,
        offset=error.offset,
        # The v2v directory, which is to go, has a link to where the logs stay.
        log=None if error.log is None else str(error.log.resolve()),
        is_permanent=is_permanent(error),
    )


def is_permanent(error: BaseException) -> bool:
    """Tell whether trying again is no use: this error, or one that caused it, says so."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _PERMANENT):
            return True
        if getattr(cause, "errno", None) in _FULL_OR_FORBIDDEN:
            return True
        cause = cause.__cause__
    return False


def delay(policy: Retries, attempt: int) -> float:
    """Return how many seconds to wait after an attempt (from 1) that failed."""
    doubled: float = policy.delay * 2.0 ** min(attempt - 1, 32)
    return min(doubled, policy.longest_delay)
