"""Copy in order, from or to a stream: what can't be asked for its size or read twice.

::

    stream ──> end       from_stream.py   several writes on their way
    end ─────> stream    to_stream.py     several reads ahead of the stream
    stream ──> stream    here

nbdcopy has one request at a time on its way here. Source: nbdcopy(1), ``--synchronous``.
"""

from __future__ import annotations

import select
from dataclasses import dataclass
from functools import partial

from v2v_async.copy.ends import End
from v2v_async.copy.from_stream import FromStream
from v2v_async.copy.pipe import Stream
from v2v_async.copy.pump import Landed, Pump, run_pump
from v2v_async.copy.to_stream import ToStream
from v2v_async.handle import ExportInfo
from v2v_async.units import KIB

# 8 MiB on their way: 160 MB/s where an answer takes 50 ms.
_REQUEST_SIZE, _REQUESTS = 512 * KIB, 16


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream is copied; sizes are bytes. Names as in ``options.CopyOptions``."""

    request_size: int = _REQUEST_SIZE
    requests: int = _REQUESTS
    sparse: int = 4 * KIB
    allocated: bool = False
    is_known_zero: bool = False
    extents: bool = True
    flush: bool = True


_DEFAULTS = StreamOptions()


async def copy_from_stream(
    source: Stream,
    target: End,
    info: ExportInfo,
    landed: Landed,
    options: StreamOptions = _DEFAULTS,
    *,
    grows: bool = False,
) -> int:
    """Copy a stream to its end; return its length in bytes.

    What the target has behind that stays as it is, as with nbdcopy. ``grows``: the target has no
    size of its own (a regular file, which gets the stream's, or null).

    Raises:
        SizeMismatchError: there is more than fits the target.
        CopyError, ConnectionLostError, SourceError: it failed; nothing is on its way any more.
    """
    return await run_pump(
        partial(
            FromStream,
            source,
            target,
            info,
            landed,
            room=None if grows else info.size,
            request_size=options.request_size,
            requests=options.requests,
            sparse=0 if options.allocated else options.sparse,
            is_known_zero=options.is_known_zero,
            flush=options.flush,
        )
    )


async def copy_to_stream(
    source: End,
    info: ExportInfo,
    target: Stream,
    landed: Landed,
    options: StreamOptions = _DEFAULTS,
) -> int:
    """Copy all of ``source`` in order; return its length in bytes.

    Raises:
        CopyError, ConnectionLostError, TargetError: it failed; nothing is on its way any more.
    """
    return await run_pump(
        partial(
            ToStream,
            source,
            info,
            target,
            landed,
            request_size=options.request_size,
            requests=options.requests,
            extents=options.extents,
        )
    )


async def copy_between_streams(source: Stream, target: Stream, landed: Landed) -> int:
    """Copy a stream to its end; return its length in bytes.

    Raises:
        SourceError, TargetError: it failed.
    """
    return await run_pump(partial(_BetweenStreams, source, target, landed))


class _BetweenStreams(Pump):
    def __init__(self, source: Stream, target: Stream, landed: Landed, wake_fd: int) -> None:
        super().__init__(None, wake_fd)
        self._source, self._target, self._landed = source, target, landed

    def copy(self) -> int:
        """Copy to the end of the source."""
        memory = memoryview(bytearray(_REQUEST_SIZE))
        total = 0
        while True:
            self.wait(self._source, select.POLLIN)
            count = self._source.read_into(memory)
            if count == 0:
                return total
            left = memory[: count or 0]
            while left:
                self.wait(self._target, select.POLLOUT)
                count = self._target.write_some(left)
                left = left[count:]
                total += count
                self._landed(count)
