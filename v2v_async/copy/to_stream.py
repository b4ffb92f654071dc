"""An end copied to a stream, in order, with reads ahead of it.

::

    end ──(extents of 64 MiB, one chunk ahead)──> requests ──> parts, in order ──> stream
                                                               ready │ ready │ being read │ …
"""

from __future__ import annotations

import select
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from v2v_async.copy.ends import End
from v2v_async.copy.pipe import Stream
from v2v_async.copy.plan import Plan, arrange
from v2v_async.copy.pump import Landed, Pump, fitting
from v2v_async.extent import align_data, from_reply
from v2v_async.handle import Entries, ExportInfo
from v2v_async.units import MIB

_EXTENTS_AT_A_TIME = 64 * MIB


@dataclass(slots=True)
class _Part:
    """The next bytes of the stream, read or zeroes. ``code`` is an errno, None while it is read."""

    offset: int
    view: memoryview
    memory: bytearray | None = None
    code: int | None = None


@dataclass(slots=True)
class _Chunk:
    """A range whose extents have been asked for."""

    offset: int
    length: int
    entries: Entries = field(default_factory=list)
    is_known: bool = False


class ToStream(Pump):
    """Copies all of ``source``, at most ``requests`` of ``request_size`` ahead of ``target``."""

    def __init__(
        self,
        source: End,
        info: ExportInfo,
        target: Stream,
        landed: Landed,
        wake_fd: int,
        *,
        request_size: int,
        requests: int,
        extents: bool,
    ) -> None:
        super().__init__(source, wake_fd)
        self._source = source
        self._info = info
        self._target = target
        self._landed = landed
        self._can_extents = extents and info.has_extents
        self._size = fitting(request_size, info)
        # An end that answers at once gains nothing from being asked ahead.
        self._depth = requests if source.fileno() >= 0 else 1
        self._chunk_size = -(-_EXTENTS_AT_A_TIME // self._size) * self._size
        self._asked = 0
        self._ahead: _Chunk | None = None
        self._plan = Plan()
        self._parts: deque[_Part] = deque()
        self._free: list[bytearray] = []
        self._zeroes = memoryview(bytes(self._size))

    def copy(self) -> int:
        """Copy to the end of the source."""
        written = 0
        while True:
            self._read_ahead()
            if not self._parts and written == self._info.size:
                return written
            head = self._ready()
            if not self.wait(self._target, select.POLLOUT if head else 0) or head is None:
                continue
            count = self._target.write_some(head.view)
            written += count
            self._landed(count)
            head.view = head.view[count:]
            if not head.view:
                self._parts.popleft()
                if head.memory is not None:
                    self._free.append(head.memory)

    def _ready(self) -> _Part | None:
        """Return the next part where it has been read."""
        head = self._parts[0] if self._parts else None
        if head is None or head.code is None:
            return None
        if head.code:
            raise self.refused("read", head.offset, len(head.view), head.code)
        return head

    def _read_ahead(self) -> None:
        while len(self._parts) < self._depth:
            request = self._next()
            if request is None:
                return
            offset, end, kind = request
            if kind != "data":
                self._parts.append(_Part(offset, self._zeroes[: end - offset], code=0))
                continue
            memory = self._free.pop() if self._free else bytearray(self._size)
            part = _Part(offset, memoryview(memory)[: end - offset], memory)
            self._parts.append(part)
            self.send(partial(self._source.read, part.view, offset), partial(setattr, part, "code"))

    def _next(self) -> tuple[int, int, str] | None:
        """Return the next request, None where there is none now."""
        while True:
            self._ask()
            request = self._plan.take(self._size, self._size)
            if request is not None:
                return request
            chunk = self._ahead
            if chunk is None or not chunk.is_known:
                return None
            self._ahead = None
            told = from_reply(chunk.offset, chunk.length, chunk.entries)
            self._plan = Plan(arrange(align_data(told, self._info.minimum_block, self._info.size)))

    def _ask(self) -> None:
        """Ask for the extents of the next chunk while the one before is read."""
        if self._ahead is not None or self._asked == self._info.size:
            return
        length = min(self._chunk_size, self._info.size - self._asked)
        chunk = self._ahead = _Chunk(self._asked, length)
        self._asked += length
        if not self._can_extents:
            chunk.is_known = True
            return

        def told(entries: Entries) -> None:
            chunk.entries = entries

        def noted(code: int) -> None:
            chunk.is_known = True
            if code:  # an end that can't tell is not asked again: all of it is data
                chunk.entries = []
                self._can_extents = False

        self.send(partial(self._source.block_status, length, chunk.offset, told), noted)
