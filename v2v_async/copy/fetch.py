"""Read many short ranges of one end at once: over a slow link one after another takes minutes."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterable
from typing import Any

from v2v_async.copy.ends import End
from v2v_async.errors import ConnectionLostError, RequestError
from v2v_async.handle import DIRECTION_READ, DIRECTION_WRITE, ExportInfo


def fetch(
    end: End, info: ExportInfo, places: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], bytes]:
    """Return the content of each (offset, length); blocks, for a thread of its own.

    Raises:
        RequestError: one can't be read.
        ConnectionLostError: the server has gone.
    """
    block = info.minimum_block
    buffers: dict[tuple[int, int], tuple[int, bytearray]] = {}
    codes: list[int] = []

    def done(error: Any) -> int:
        codes.append(error.value)
        return 1

    for offset, length in places:
        start = offset // block * block
        stop = min(-(-(offset + length) // block) * block, info.size)
        buffer = bytearray(stop - start)
        buffers[offset, length] = offset - start, buffer
        end.read(memoryview(buffer), start, done)
    _wait(end, codes, len(buffers))
    failed = next((code for code in codes if code), 0)
    if failed:
        name = errno.errorcode.get(failed, str(failed))
        reason = f"{os.strerror(failed)} ({name})"
        raise RequestError("reading a sample", offset=0, length=0, reason=reason, errno=failed)
    return {
        (offset, length): bytes(buffer[skip : skip + length])
        for (offset, length), (skip, buffer) in buffers.items()
    }


def _wait(end: End, codes: list[int], count: int) -> None:
    """Drive ``end`` until all are answered."""
    poll = select.poll()
    while len(codes) < count:
        direction = end.direction()
        if not direction:
            raise ConnectionLostError("the server closed the connection")
        events = select.POLLIN if direction & DIRECTION_READ else 0
        events |= select.POLLOUT if direction & DIRECTION_WRITE else 0
        poll.register(end.fileno(), events)
        for _, ready in poll.poll():
            if ready & ~select.POLLOUT and direction & DIRECTION_READ:
                end.notify_readable()
            else:
                end.notify_writable()
