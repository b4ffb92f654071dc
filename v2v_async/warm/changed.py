"""What every source of changed blocks does, and how a dirty bitmap is read.

::

    opened(since, mark) ──> Opened: for each disk where to read, and which ranges ──> (copied)
                            the content is of one moment, which ``mark`` names for the next pass
    forget(keep) ─────────> what this run made on the source goes, but for ``keep``
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import anyio.to_thread

from v2v_async.connection import connected
from v2v_async.copy.ranges import Ranges
from v2v_async.errors import NbdError, SourceError
from v2v_async.events import Reporter
from v2v_async.input.changes import merged
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir

_DIRTY = 1  # of qemu:dirty-bitmap (docs/interop/nbd.txt of qemu)
_MOST = 1 << 30  # bytes asked about at once: servers take 32 bits


class MarkLostError(SourceError):
    """What has changed since a mark can't be told any more: all has to be copied again."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Where disk ``index`` (1-based) is read, and what of it: ``ranges`` None is all of it."""

    index: int
    endpoint: str
    ranges: Ranges | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What a pass copies.

    ``mark``: what the next pass may start from; None: this moment could not be marked. ``is_off``:
    the guest does not run, so that this is all there is to copy. ``point``: the moment that the
    content is of, in seconds since the epoch.
    """

    deltas: Sequence[Delta]
    mark: str | None
    is_off: bool
    point: float = field(default_factory=time.time)


class ChangedBlocks(Protocol):
    """A source that can be read while its guest runs. Construction does no I/O."""

    def opened(
        self, since: str | None, mark: str, v2vdir: V2VDir, servers: Servers, reporter: Reporter
    ) -> AbstractAsyncContextManager[Opened]:
        """Have what has changed since the mark ``since`` (None: everything) for a block's duration.

        Marks of this run other than ``since`` are removed where that loses nothing.

        Raises:
            MarkLostError: there is no such mark any more.
            SourceError: it can't be read.
        """
        ...

    async def forget(self, keep: str | None, reporter: Reporter) -> None:
        """Remove what this run made on the source, but for the mark ``keep``; may be repeated.

        Raises:
            SourceError: the source can't be asked.
        """
        ...


async def dirty_ranges(endpoint: str, bitmap: str) -> Ranges:
    """Return what is set in a dirty bitmap that an NBD export tells, in blocks of 4 KiB.

    Raises:
        NbdError: the export can't be reached, or does not tell it.
    """
    context = f"qemu:dirty-bitmap:{bitmap}"
    found: list[tuple[int, int]] = []
    async with connected(endpoint, contexts=(context,)) as connection:
        size, offset = connection.info.size, 0
        while offset < size:
            ask = partial(connection.handle.extents_now, min(size - offset, _MOST), offset, context)
            told = await anyio.to_thread.run_sync(ask)
            if not told:
                raise NbdError(f"the server of ‘{endpoint}’ tells no {context}")
            for length, flags in told:
                if flags & _DIRTY:
                    found.append((offset, min(length, size - offset)))
                offset += length
    return Ranges(merged(found, size))
