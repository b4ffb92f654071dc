"""Changed blocks where the source tells none: all of it is read, and digests are compared.

::

    source ──read──> digest ── as the table has it? ──yes──> nothing
                                                   └──no───> write the same bytes, note the digest

The table has 16 bytes for each 64 KiB of the disk, as they are on the *target*: what is written is
what was digested, whatever the source becomes meanwhile. A block of zeroes has a digest of zeroes,
so that the table of a new disk is empty. After a pass that died the table is made anew, by reading
the target.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import get_ident

import anyio
import anyio.to_thread

from v2v_async.connection import export_info
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.throttle import Throttle, request_limit
from v2v_async.durable import sync
from v2v_async.errors import CopyError, NbdError, V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.extent import align_data, from_reply
from v2v_async.handle import ExportInfo, Handle, ZeroTest
from v2v_async.units import KIB, MIB

BLOCK = 64 * KIB
"""What a digest is of: as much as a cluster of qcow2."""
_DIGEST = 16
_ZERO = bytes(_DIGEST)
_REQUEST = MIB
_WINDOW = 64 * MIB  # of which the extents are asked for at once, by one thread
_THREADS = 4  # as many pairs of connections as a copy begins with (copy/negotiation.py)
_REPORT_EVERY_S = 0.2
_DRAIN_S = 5.0


def empty_table(size: int) -> bytearray:
    """Return the table of a disk of ``size`` bytes that is all zeroes."""
    return bytearray(-(-size // BLOCK) * _DIGEST)


def read_table(path: Path, size: int) -> bytearray | None:
    """Return a table that was saved for a disk of ``size`` bytes; None where it is not there."""
    try:
        table = bytearray(path.read_bytes())
    except FileNotFoundError:
        return None
    return table if len(table) == len(empty_table(size)) else None


def save_table(path: Path, table: bytearray) -> None:
    """Have a table on the disk.

    Raises:
        V2VError: it can't be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(table)
        sync(new)
        os.replace(new, path)
    except OSError as error:
        raise V2VError(f"‘{new}’ can't be written: {error.strerror}") from error


async def copy_different(
    source: str,
    target: str | None,
    table: bytearray,
    reporter: Reporter,
    only: Ranges | None = None,
    throttle: Throttle | None = None,
) -> Bytes:
    """Write to ``target`` what differs from the table, and note it there; flush at the end.

    ``target`` None: only note it. ``only``: nothing else is looked at. ``throttle``: of what is
    read. What did not differ counts as resumed. When this raises or is cancelled the table is of no
    use any more.

    Raises:
        CopyError: the disk failed.
    """
    assert reporter.disk is not None
    ends = [await export_info(end) for end in (source, target) if end is not None]
    if ends[-1].size < ends[0].size:
        raise CopyError(
            f"the target has {ends[-1].size} bytes, the source has {ends[0].size}",
            disk=reporter.disk,
        )
    work = _Work(source, target, ends, table, only, throttle)
    threads = _THREADS if all(end.can_multi_conn for end in ends) else 1
    began = anyio.current_time()
    reporter.emit("started", bytes=work.landed())
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(_tell, work, reporter)
            async with anyio.create_task_group() as lanes:
                limiter = anyio.CapacityLimiter(threads)
                for _ in range(threads):
                    lanes.start_soon(partial(anyio.to_thread.run_sync, work.run, limiter=limiter))
            group.cancel_scope.cancel()
        if target is not None:
            await anyio.to_thread.run_sync(_flush, target)
    except BaseExceptionGroup as errors:
        error = most_telling(errors)
        if isinstance(error, NbdError):
            error = CopyError(error.message, disk=reporter.disk, offset=error.offset)
        if isinstance(error, V2VError):
            error.locate(disk=reporter.disk)
            reporter.emit("failed", error.message, bytes=work.landed(), offset=error.offset)
        raise error from None
    except anyio.get_cancelled_exc_class():
        reporter.emit("cancelled", bytes=work.landed())
        raise
    reporter.emit("finished", bytes=work.landed(), duration_s=anyio.current_time() - began)
    return work.landed()


async def _tell(work: _Work, reporter: Reporter) -> None:
    """Say how far it is; when this is cancelled, the threads end soon."""
    try:
        while True:
            reporter.emit("progress", bytes=work.landed())
            await anyio.sleep(_REPORT_EVERY_S)
    finally:
        work.is_stopping = True
        with anyio.CancelScope(shield=True), anyio.move_on_after(_DRAIN_S):
            while work.running:
                await anyio.sleep(0.02)
        work.sever()


def _flush(target: str) -> None:
    handle = Handle()
    try:
        handle.connect(target)
        if handle.info().can_flush:
            handle.flush_now()
    finally:
        handle.close()


@dataclass(eq=False)
class _Work:
    """What the threads share: which window is next, and what came of those before."""

    source: str
    target: str | None
    ends: list[ExportInfo]
    table: bytearray
    only: Ranges | None
    throttle: Throttle | None = None
    is_stopping: bool = False
    running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _handles: list[Handle] = field(default_factory=list)
    _next: int = 0
    _copied: int = 0
    _zero: int = 0
    _same: int = 0

    @property
    def size(self) -> int:
        return self.ends[0].size

    def landed(self) -> Bytes:
        landed = self._copied + self._zero + self._same
        return Bytes(
            total=self.size,
            data=self._copied + max(0, self.size - landed),
            copied=self._copied,
            zero=self._zero,
            resumed=self._same,
        )

    def sever(self) -> None:
        """Let calls fail that still wait for servers which hang."""
        with self._lock:
            for handle in self._handles:
                handle.sever()

    def run(self) -> None:
        """Do windows until there are no more. In a thread.

        Raises:
            NbdError
        """
        with self._lock:
            self.running += 1
        source = Handle()
        target = None if self.target is None else Handle()
        try:
            source.connect(self.source)
            if target is not None:
                assert self.target is not None
                target.connect(self.target)
            with self._lock:
                self._handles += [handle for handle in (source, target) if handle is not None]
            while (window := self._claim()) is not None:
                self._do(window[0], window[1], source, target)
        finally:
            with self._lock:
                self.running -= 1
                self._handles = [h for h in self._handles if h not in (source, target)]
            source.close()
            if target is not None:
                target.close()

    def _claim(self) -> tuple[int, int] | None:
        with self._lock:
            offset = self._next
            if self.is_stopping or offset >= self.size:
                return None
            self._next = min(offset + _WINDOW, self.size)
            return offset, self._next - offset

    def _do(self, offset: int, length: int, source: Handle, target: Handle | None) -> None:
        for start, count in self._wanted(offset, length):
            entries = []
            if self.ends[0].has_extents:
                entries = source.extents_now(count, start)
            for extent in align_data(from_reply(start, count, entries), BLOCK, self.size):
                if extent.is_zero:
                    self._zeroes(extent.offset, extent.length, target)
                    continue
                at = extent.offset
                while at < extent.end:
                    size = min(self._request(), extent.end - at)
                    if not self._may_read(size):
                        return
                    self._data(at, source.read_now(size, at), target)
                    at += size

    def _request(self) -> int:
        """Return how much is read at once: whole blocks, that keep the rate smooth."""
        limit = None if self.throttle is None else request_limit(self.throttle.rate)
        most = min(_REQUEST, self.ends[0].maximum_block, limit or _REQUEST)
        return max(BLOCK, most // BLOCK * BLOCK)

    def _may_read(self, length: int) -> bool:
        """Wait for the throttle; return whether the work goes on."""
        while not self.is_stopping:
            wait = 0.0 if self.throttle is None else self.throttle.take(length, get_ident(), self)
            if wait == 0:
                return True
            time.sleep(wait)
        return False

    def _wanted(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the (offset, length) of a window that are to be looked at, in whole blocks."""
        if self.only is None:
            return [(offset, length)]
        found = Ranges()
        for start, count in self.only:
            first = max(offset, start // BLOCK * BLOCK)
            last = min(offset + length, -(-(start + count) // BLOCK) * BLOCK)
            if first < last:
                found.add(first, last - first)
        with self._lock:
            self._same += length - found.total
        return list(found)

    def _data(self, offset: int, content: bytearray, target: Handle | None) -> None:
        is_zero = ZeroTest(content)
        view = memoryview(content)
        same = 0
        pieces: list[tuple[int, int, bool]] = []
        for at in range(0, len(content), BLOCK):
            size = min(BLOCK, len(content) - at)
            zero = is_zero(at, size)
            found = _ZERO
            if not zero:
                found = hashlib.blake2b(view[at : at + size], digest_size=_DIGEST).digest()
            if not self._note((offset + at) // BLOCK, found):
                same += size
            elif pieces and pieces[-1][2] == zero and sum(pieces[-1][:2]) == at:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + size, zero)
            else:
                pieces.append((at, size, zero))
        for at, size, zero in pieces:
            if target is not None and zero:
                self._make_zero(target, offset + at, size)
            elif target is not None:
                target.write_now(view[at : at + size], offset + at)
        with self._lock:
            self._same += same
            self._copied += sum(size for _, size, zero in pieces if not zero)
            self._zero += sum(size for _, size, zero in pieces if zero)

    def _zeroes(self, offset: int, length: int, target: Handle | None) -> None:
        same = 0
        for at in range(offset, offset + length, BLOCK):
            size = min(BLOCK, offset + length - at)
            if not self._note(at // BLOCK, _ZERO):
                same += size
            elif target is not None:
                self._make_zero(target, at, size)
        with self._lock:
            self._same += same
            self._zero += length - same

    def _note(self, block: int, found: bytes) -> bool:
        """Put a block's digest into the table; return whether it was another one."""
        place = slice(block * _DIGEST, (block + 1) * _DIGEST)
        if self.table[place] == found:
            return False
        self.table[place] = found
        return True

    def _make_zero(self, target: Handle, offset: int, length: int) -> None:
        if self.ends[-1].can_zero:
            target.zero_now(length, offset)
        else:
            target.write_now(memoryview(bytes(length)), offset)
