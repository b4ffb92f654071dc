"""An end that takes the digest of what goes through it, for copies in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from v2v_async.copy.digest import DiskDigest
from v2v_async.copy.ends import End
from v2v_async.copy.file import FileEnd
from v2v_async.copy.ranges import Ranges
from v2v_async.handle import Completion, Entries


class HashedEnd:
    """``end``, whose reads and writes are added to ``digest`` when they have succeeded.

    What is neither read nor written of it is zeroes: a hole of a source, or zeroes that the target
    has already.
    """

    def __init__(self, end: End, digest: DiskDigest, *, has_size: bool) -> None:
        self._end = end
        self._digest = digest
        self._has_size = has_size
        self._seen = Ranges()

    def finish(self, length: int) -> None:
        """Add the zeroes that nothing was done for; ``length`` is the whole's, in bytes."""
        for offset, size in list(self._seen.gaps(0, length)):
            self._digest.add_zeroes(offset, size)
        if not self._has_size:
            self._digest.end(length)

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        """Fill ``view``."""
        self._end.read(view, offset, self._then(view, offset, done))

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        """Write ``view``."""
        self._end.write(view, offset, self._then(view, offset, done))

    def _then(self, view: memoryview, offset: int, done: Completion) -> Completion:
        def hashed(error: Any) -> int:
            if error.value == 0:
                self._digest.add(offset, view)
                self._seen.add(offset, len(view))
            return done(error)

        return hashed

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        """Make zeroes, which :meth:`finish` adds."""
        self._end.zero(length, offset, done, allocate=allocate, only_fast=only_fast)

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        """Ask for extents."""
        self._end.block_status(length, offset, told, done)

    def set_size(self, size: int) -> None:
        """Give a file its size."""
        if isinstance(self._end, FileEnd):
            self._end.set_size(size)

    # The rest is the end's own.

    @property
    def is_lost(self) -> bool:
        """Whether it can't be used any more."""
        return self._end.is_lost

    def flush(self, done: Completion) -> None:
        """Put all finished writes on stable storage."""
        self._end.flush(done)

    def flush_now(self) -> None:
        """Flush and wait."""
        self._end.flush_now()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._end.fileno()

    def direction(self) -> int:
        """Return what to poll for now."""
        return self._end.direction()

    def notify_readable(self) -> None:
        """Take what has arrived."""
        self._end.notify_readable()

    def notify_writable(self) -> None:
        """Send what is waiting."""
        self._end.notify_writable()

    def close(self, *, politely: bool = True) -> None:
        """Close it."""
        self._end.close(politely=politely)
