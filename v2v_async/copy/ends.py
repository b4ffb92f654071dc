"""One open side of a copy, whatever is behind it: a table of operations that hides the kind.

::

    End ── Handle     (v2v_async/handle.py)  an NBD connection: answers later, is polled
        ├─ FileEnd    (file.py)              a file or device: has answered when the call returns
        └─ NullEnd    (null.py)              keeps nothing

A request is handed over with ``done``; it is called once, with an object whose ``value`` is an
errno (0: done), during the call or later while the end is driven. Source: libnbd(3), "Completion
callbacks"; nbdcopy's own ends do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from v2v_async.handle import Completion, Entries


class BlockingEnd(Protocol):
    """What a lane of one request at a time needs: calls that wait for the answer.

    They raise RequestError where the request failed, and where the connection is lost.
    """

    @property
    def is_lost(self) -> bool:
        """Whether it can't be used any more."""

    def read_now(self, length: int, offset: int) -> bytearray:
        """Return ``length`` bytes from ``offset``."""

    def write_now(self, view: memoryview, offset: int) -> None:
        """Write all of ``view`` at ``offset``."""

    def zero_now(
        self, length: int, offset: int, *, allocate: bool = False, only_fast: bool = False
    ) -> None:
        """Make a range read as zeroes, as :meth:`End.zero` does."""

    def extents_now(self, length: int, offset: int) -> Entries:
        """Return the ``base:allocation`` extents of a range."""

    def flush_now(self) -> None:
        """Put all finished writes on stable storage."""

    def sever(self) -> None:
        """Make a call that waits in another thread fail, where that can be done."""


class End(Protocol):
    """What a lane needs of a source or a target. Used by one thread at a time.

    Requests raise ConnectionLostError or UnsupportedError where they can't be sent; ``done`` is
    then never called.
    """

    @property
    def is_lost(self) -> bool:
        """Whether it can't be used any more."""

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        """Fill ``view`` (all of it) from ``offset``."""

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        """Write ``view`` (all of it) at ``offset``; it must stay unchanged until done."""

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        """Make a range read as zeroes, never by trimming.

        ``allocate``: the range must take room. ``only_fast``: fail with ENOTSUP where writing
        zeroes would be as fast.
        """

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        """Ask for the ``base:allocation`` extents of a range."""

    def flush(self, done: Completion) -> None:
        """Put all finished writes on stable storage."""

    def flush_now(self) -> None:
        """Flush and wait. Raises RequestError where it fails."""

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 where requests are done when their call returns."""

    def direction(self) -> int:
        """Return what to poll for now."""

    def notify_readable(self) -> None:
        """Take what has arrived; completions run here."""

    def notify_writable(self) -> None:
        """Send what is waiting; completions may run here."""

    def close(self, *, politely: bool = True) -> None:
        """Close it. Requests in flight must have been waited for."""


class DiskEnd(End, BlockingEnd, Protocol):
    """An end that can be used either way: what files, NBD connections and ``null:`` are."""
