"""Every error this program raises on purpose, and the exit status each one means.

::

    V2VError (exit 1)
    ├ UsageError (2)
    ├ NotBuiltError          asked for by its right name, not written yet
    ├ DependencyError        what is missing, and the command that adds it
    ├ ServerError ── ServerStartError (argv, stderr tail) · ServerExitedError (status)
    ├ NbdError ───── ConnectError · ConnectionLostError (unusable)
    │                · RequestError (op, offset, length; usable) · UnsupportedError (never resend)
    ├ CopyError (guest, disk, offset, cause) ── SizeMismatchError · VerifyError
    ├ SourceError · TargetError
    └ ConversionError (phase, cause, log)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


class V2VError(Exception):
    """A failure that a person can act on.

    ``message`` says what failed; ``hint`` what to do next. ``guest``, ``step``, ``disk`` (1-based)
    and ``log`` say where; whoever knows them fills them in on the way up (see :meth:`locate`).
    """

    exit_status = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        guest: str | None = None,
        step: str | None = None,
        disk: int | None = None,
        offset: int | None = None,
        log: Path | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.guest = guest
        self.step = step
        self.disk = disk
        self.offset = offset
        self.log = log

    def locate(
        self,
        *,
        guest: str | None = None,
        step: str | None = None,
        disk: int | None = None,
        log: Path | None = None,
    ) -> None:
        """Fill in where it happened, without overwriting what is known already."""
        self.guest = self.guest if self.guest is not None else guest
        self.step = self.step if self.step is not None else step
        self.disk = self.disk if self.disk is not None else disk
        self.log = self.log if self.log is not None else log

    @property
    def where(self) -> str:
        """The known part of "guest G, step S, disk D, offset O" (empty when nothing is known)."""
        parts = []
        if self.guest is not None:
            parts.append(f"guest {self.guest}")
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.disk is not None:
            parts.append(f"disk {self.disk}")
        if self.offset is not None:
            parts.append(f"offset {self.offset}")
        return ", ".join(parts)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class UsageError(V2VError):
    """The command line is wrong."""

    exit_status = 2


class NotBuiltError(V2VError):
    """A feature named by its right name that this version does not have yet."""

    def __init__(self, feature: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"{feature} is not built yet in this version of v2v-async",
            hint=hint or "use virt-v2v(1) for this guest, or a newer v2v-async",
        )
        self.feature = feature


class DependencyError(V2VError):
    """A program, plugin or library is missing; ``hint`` is the command that adds it."""


class ServerError(V2VError):
    """An NBD server failed."""


class ServerStartError(ServerError):
    """A server did not become ready. ``argv`` has no secrets; ``stderr_tail`` is its last words."""

    def __init__(self, message: str, *, argv: list[str], stderr_tail: str, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.argv = argv
        self.stderr_tail = stderr_tail


class ServerExitedError(ServerError):
    """A server went away while it was needed. ``status`` is as in :mod:`subprocess`."""

    def __init__(self, message: str, *, status: int, stderr_tail: str, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.status = status
        self.stderr_tail = stderr_tail


class NbdError(V2VError):
    """An NBD connection or request failed. ``errno`` is 0 where libnbd gave none."""

    def __init__(self, message: str, *, errno: int = 0, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.errno = errno


class ConnectError(NbdError):
    """No connection could be made."""


class ConnectionLostError(NbdError):
    """The connection is gone; the handle can't be used again."""


class RequestError(NbdError):
    """The server refused one request; the connection can still be used."""

    def __init__(
        self, op: str, *, offset: int, length: int, reason: str, errno: int = 0, **where: object
    ) -> None:
        super().__init__(
            f"{op} of {length} bytes failed: {reason}", errno=errno, offset=offset, **where
        )
        self.op = op
        self.length = length


class UnsupportedError(NbdError):
    """The server can't do this; sending it again never helps."""


class CopyError(V2VError):
    """Copying a disk failed; ``disk``, ``offset`` and the cause (``__cause__``) say how."""


class SizeMismatchError(CopyError):
    """The target is too small for the source."""


class VerifyError(CopyError):
    """Source and target differ after the copy; ``ranges`` are (offset, length) in bytes."""

    def __init__(self, message: str, *, ranges: list[tuple[int, int]], **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.ranges = ranges


class SourceError(V2VError):
    """The source can't be read or understood."""


class GuestChangedError(SourceError):
    """The guest has other disks than when it was looked at, and will have them next time too."""


class TargetError(V2VError):
    """The target can't be made or written."""


class NotKeptError(V2VError):
    """What an earlier attempt had converted is not there any more; the next one converts again."""


class ConversionError(V2VError):
    """virt-v2v-in-place failed; ``phase`` is the last thing that it said it was doing."""

    def __init__(self, message: str, *, phase: str | None = None, **where: object) -> None:
        super().__init__(message, **where)  # type: ignore[arg-type]
        self.phase = phase


def most_telling(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception of a task group that says best what went wrong.

    A server's exit explains the errors of those who used it, so it comes first; then what this
    program raises on purpose; then anything else.
    """
    found = list(leaves(group))
    for kind in (ServerExitedError, V2VError, Exception, BaseException):
        for leaf in found:
            if isinstance(leaf, kind):
                return leaf
    return group


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors in ``error``, which may be a group of groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
