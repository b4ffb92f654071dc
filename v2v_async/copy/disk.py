"""One disk being copied: what is left to do, what has landed, what is durable, what went wrong.

::

    todo ──claim──> live ──landed──> landed ──flush──> durable
      ^              │ a lane lost its connection │ the target was lost
      └──────────────┴────────────────────────────┘

A server that dies may take with it what it was told and had not flushed. So what has landed since
the last flush goes back to ``todo`` when a connection to the target is lost, and every lane of the
disk begins anew (the *epoch* counts these), since nothing tells a server that was restarted from a
connection that was cut.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v2v_async.copy.geometry import Geometry
from v2v_async.copy.plan import Part, cut
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.retrying import HINTS
from v2v_async.errors import CopyError, NbdError, RequestError
from v2v_async.events import Bytes

if TYPE_CHECKING:
    from v2v_async.copy.digest import DiskDigest
    from v2v_async.copy.samples import WrittenSamples


@dataclass(slots=True, eq=False)
class Chunk:
    """A range that one lane works on. Sizes are bytes; written by that lane's thread alone.

    ``is_there``: an earlier run has flushed it; it is only read for the digest. ``parts``: what is
    to be done, where the extents are known already. ``outstanding`` counts requests, ``is_planned``
    says that there will be no more of them.
    """

    offset: int
    length: int
    is_there: bool = False
    parts: list[Part] | None = None
    outstanding: int = 0
    is_planned: bool = False
    examined: int = 0
    data: int = 0
    copied: int = 0
    zero: int = 0
    skipped: int = 0

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


# A lane asks for the extents of this part of what is left, so that the others find something.
_WINDOWS = 8
# An answer costs what the storage makes of it: tmpfs looks at every page up to the next hole, 27 ms
# in a dense file of 4 GiB, and VDDK is slow as well. So few are asked for, and yet never all at
# once.
_LARGEST_WINDOW = 1024**3
_MOST_PARTS = 8192  # of a window: about 1 MiB of memory


@dataclass(frozen=True, slots=True)
class _Range:
    """A range from ``start`` to before ``end`` that is to be done; ``parts``: what, if known."""

    start: int
    end: int
    is_there: bool = False
    parts: list[Part] | None = None


@dataclass(slots=True)
class _Sum:
    """Bytes of chunks that are done."""

    examined: int = 0
    data: int = 0
    copied: int = 0
    zero: int = 0
    skipped: int = 0

    def add(self, chunk: Chunk, sign: int = 1) -> None:
        self.examined += sign * chunk.examined
        self.data += sign * chunk.data
        self.copied += sign * chunk.copied
        self.zero += sign * chunk.zero
        self.skipped += sign * chunk.skipped


class DiskCopy:
    """A disk that several lanes, perhaps in several threads, copy together.

    ``is_known_zero``: the target reads as zeroes wherever nothing was written. What the servers
    turn out not to do (``can_zero``, ``can_extents``, ``can_target_extents``; and
    ``makes_small_zeroes``, which stands for zeroes found in data) is switched off by the lane that
    finds it out. ``parts``: only these are to be done, in order and on blocks of the target.
    """

    def __init__(
        self,
        index: int,
        geometry: Geometry,
        *,
        is_known_zero: bool = False,
        can_zero: bool = True,
        can_fast_zero: bool = False,
        can_extents: bool = True,
        can_target_extents: bool = False,
        allocated: bool = False,
        digest: DiskDigest | None = None,
        written: WrittenSamples | None = None,
        done: Iterable[tuple[int, int]] = (),
        parts: Sequence[Part] | None = None,
        epoch: int = 0,
    ) -> None:
        self.index = index
        self.geometry = geometry
        self.is_known_zero = is_known_zero and not allocated
        self.can_zero = can_zero
        self.can_fast_zero = can_fast_zero
        self.makes_small_zeroes = can_zero
        self.can_extents = can_extents
        self.can_target_extents = can_target_extents and not allocated
        self.allocated = allocated
        self.digest = digest
        self.written = written
        self.differences: list[tuple[int, int]] = []
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.epoch = epoch
        self.generation = 0
        """Changes whenever lanes have to end: an error, a cancellation, a new epoch."""
        self.wants_flush = False
        self.wake: Callable[[], None] = lambda: None
        """Makes the workers look at their lanes; may be called in any thread."""
        self.on_durable: Callable[[list[tuple[int, int]]], None] = lambda ranges: None
        """Given ranges (offset, length) that have been flushed; called in a worker's thread."""
        self.flush_after: int | None = None
        """Bytes that have landed after which :attr:`on_much` asks for a flush."""
        self.hold_at: int | None = None
        """Bytes that have landed and were not flushed after which nothing more is sent."""
        self.on_much: Callable[[], None] = lambda: None
        """Called in a worker's thread, each time that so many more bytes have landed."""
        self._lock = threading.Lock()
        self._live: set[Chunk] = set()
        self._landed: list[Chunk] = []
        self._flushing: list[Chunk] = []
        self._unflushed = 0
        self._being_flushed = 0
        self._sum = _Sum()
        self._retried = 0
        self._resumed = 0
        self.chunks_landed = 0
        self.flushes = 0
        self._todo: deque[_Range] = deque()
        self._window = geometry.chunk
        self.is_paused = False
        """Lanes find nothing to do meanwhile; what they have claimed is done."""
        self.wrote: Ranges | None = None
        """Where data may have been written, if somebody wants to know (:meth:`note_wrote`)."""
        self._left_out = Ranges()
        self._unwanted = Ranges()
        self._elsewhere = 0
        if parts is None:
            self._fill_todo(done)
        else:
            self._fill_with(parts)

    def _fill_todo(self, done: Iterable[tuple[int, int]]) -> None:
        """Put all of the disk to do, but for ranges (offset, length) that are ``done``."""
        geometry = self.geometry
        position = 0
        for offset, length in done:
            if offset > position:
                self._todo.append(_Range(position, offset))
            end = min(offset + length, geometry.size)
            if end > offset:
                self._resumed += end - offset
                if self.digest is not None:
                    self._todo.append(_Range(offset, end, is_there=True))
            position = offset + length
        if position < geometry.size:
            self._todo.append(_Range(position, geometry.size))

    def _fill_with(self, parts: Sequence[Part]) -> None:
        """Put only ``parts`` to do."""
        run: list[Part] = []
        for part in parts:
            if run and run[-1][1] != part[0]:
                self._todo.append(_Range(run[0][0], run[-1][1], parts=run))
                run = []
            run.append(part)
        if run:
            self._todo.append(_Range(run[0][0], run[-1][1], parts=run))
        self._elsewhere = self.geometry.size - sum(end - start for start, end, _ in parts)

    # What lanes call.

    def claim(self, size: int) -> Chunk | None:
        """Take the next chunk; None: there is none now, or none is wanted.

        It has at most ``size`` bytes where what is to be done is known; else it is a window, larger
        each time, whose extents are to be asked for (:meth:`learn`).
        """
        if self.is_stopping or self.is_paused:
            return None
        with self._lock:
            if self._unwanted:
                self._drop_unwanted()
            if not self._todo:
                return None
            found = self._todo.popleft()
            if found.parts is None and not found.is_there and self.can_extents:
                window = min(self._window, (found.end - found.start) // _WINDOWS)
                # In whole chunks, which keep requests on blocks and on multiples of their size.
                size = max(size, window // self.geometry.chunk * self.geometry.chunk)
                self._window = min(self._window * 2, _LARGEST_WINDOW)
            stop = min(found.start + size, found.end)
            parts, rest = cut(found.parts, stop) if found.parts is not None else (None, None)
            if stop < found.end:
                self._todo.appendleft(_Range(stop, found.end, found.is_there, rest))
            chunk = Chunk(found.start, stop - found.start, found.is_there, parts)
            self._live.add(chunk)
            return chunk

    def _drop_unwanted(self) -> None:
        """Leave out what is unwanted at the head of what is to be done."""
        while self._todo:
            found = self._todo[0]
            gaps = self._unwanted.gaps(found.start, found.end)
            wanted = next(gaps, (found.end, 0))
            if wanted == (found.start, found.end - found.start):
                return
            self._todo.popleft()
            self._left_out.add(found.start, wanted[0] - found.start)
            self._elsewhere += wanted[0] - found.start
            if not wanted[1]:
                continue
            # Only the first range is needed now; the rest is looked at when it is claimed.
            stop = sum(wanted)
            head, rest = None, None
            if found.parts is not None:
                head, rest = cut(cut(found.parts, wanted[0])[1], stop)
            if stop < found.end:
                self._todo.appendleft(_Range(stop, found.end, found.is_there, rest))
            self._todo.appendleft(_Range(wanted[0], stop, found.is_there, head))
            return

    def note_wrote(self, offset: int, length: int) -> None:
        """Note that data may have been written there."""
        if self.wrote is not None:
            with self._lock:
                self.wrote.add(offset, length)

    def learn(self, chunk: Chunk, parts: list[Part], size: int) -> list[Part]:
        """Note what is to be done in a chunk; return the part of it that its lane keeps.

        That is at most ``size`` bytes where there is data; the rest is for whoever claims next.
        """
        if len(parts) > _MOST_PARTS:
            self._window = max(self.geometry.chunk, self._window // 8)
        if chunk.length <= size or all(kind == "skip" for _, _, kind in parts):
            return parts
        mine, rest = cut(parts, chunk.offset + size)
        with self._lock:
            self._todo.appendleft(_Range(chunk.offset + size, chunk.end, parts=rest))
            chunk.length = size
        return mine

    def learn_data(self, offset: int, end: int) -> None:
        """Note that a range holds data, so that nobody asks for what of it is still to be done."""
        todo: deque[_Range] = deque()
        with self._lock:
            for found in self._todo:
                start, stop = max(found.start, offset), min(found.end, end)
                if start >= stop or found.is_there or found.parts is not None:
                    todo.append(found)
                    continue
                if found.start < start:
                    todo.append(_Range(found.start, start))
                todo.append(_Range(start, stop, parts=[(start, stop, "data")]))
                if stop < found.end:
                    todo.append(_Range(stop, found.end))
            self._todo = todo

    def shorten(self, chunk: Chunk, length: int) -> None:
        """Keep only the first ``length`` bytes of a chunk; the rest is to be done."""
        if length == chunk.length:
            return
        with self._lock:
            rest = _Range(chunk.offset + length, chunk.end, chunk.is_there)
            self._todo.appendleft(rest)
            chunk.length = length

    def keep(self, chunk: Chunk, length: int) -> None:
        """Keep only the first ``length`` bytes of a planned chunk, which are done."""
        rest = chunk.length - length
        self.shorten(chunk, length)
        if not chunk.is_there:
            # All that was planned there counts as not examined yet.
            chunk.examined -= rest
            chunk.data = chunk.copied

    def give_back(self, chunk: Chunk) -> None:
        """Do a chunk again, all of it: its lane could not finish it."""
        with self._lock:
            self._live.discard(chunk)
            self._retry(chunk)

    def landed(self, chunk: Chunk, epoch: int) -> None:
        """Note that all of a chunk is on the target, which may not have flushed it yet."""
        with self._lock:
            self._live.discard(chunk)
            if epoch != self.epoch:
                self._retry(chunk)
                return
            self._sum.add(chunk)
            self.chunks_landed += 1
            if chunk.is_there:
                return
            self._landed.append(chunk)
            before = self._unflushed
            # Zeroes cost little, but where they are written.
            self._unflushed += chunk.copied if self.can_zero else chunk.copied + chunk.zero
            step = self.flush_after
            is_much = step is not None and before // step < self._unflushed // step
        if is_much:
            self.on_much()

    def target_lost(self, epoch: int) -> None:
        """Do again what has landed and was not flushed: the server may have forgotten it."""
        with self._lock:
            if epoch != self.epoch:
                return  # another lane has told
            self.epoch += 1
            self.generation += 1
            for chunk in (*self._flushing, *self._landed):
                self._sum.add(chunk, -1)
                self._retry(chunk)
            self._flushing, self._landed = [], []
            self._unflushed = self._being_flushed = 0
        self.wake()

    def begin_flush(self) -> bool:
        """Whether a flush is to be sent now; what has landed so far will then be durable."""
        with self._lock:
            if self._flushing:
                return False
            self._flushing, self._landed = self._landed, []
            self._being_flushed, self._unflushed = self._unflushed, 0
            return bool(self._flushing)

    def flushed(self, epoch: int) -> None:
        """Note that the flush that was begun in ``epoch`` has succeeded."""
        with self._lock:
            if epoch != self.epoch:
                return
            chunks, self._flushing = self._flushing, []
            self._being_flushed = 0
            self.flushes += 1
        self.on_durable([(chunk.offset, chunk.length) for chunk in chunks])

    def differ(self, ranges: list[tuple[int, int]]) -> None:
        """Note ranges (offset, length) in which the two sides differ."""
        with self._lock:
            self.differences += ranges

    def fail(self, op: str, error: BaseException, offset: int | None = None) -> None:
        """Note the first error; the lanes then finish what is in flight and stop."""
        with self._lock:
            if self.error is not None:
                return
            if isinstance(error, RequestError):
                wrapped: BaseException = CopyError(
                    error.message,
                    disk=self.index,
                    offset=error.offset,
                    hint=HINTS.get(error.errno),
                )
            elif isinstance(error, NbdError):
                wrapped = CopyError(f"{op}: {error.message}", disk=self.index, offset=offset)
            else:
                wrapped = error
            wrapped.__cause__ = error if wrapped is not error else None
            self.error = wrapped
            self.generation += 1
        # A lane that waits for a server which hangs would otherwise not learn of it.
        self.wake()

    # What the engine calls.

    def leave_out(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Do not do these ranges (offset, length), on blocks of the target, from now on.

        What has been claimed is done all the same: :attr:`left_out` tells what was not.
        """
        with self._lock:
            for offset, length in ranges:
                self._unwanted.add(offset, length)

    @property
    def left_out(self) -> Ranges:
        """What :meth:`leave_out` has kept from being done so far."""
        with self._lock:
            return self._left_out.copy()

    @property
    def may_hold_data(self) -> Ranges:
        """Where data may have been written so far."""
        with self._lock:
            return self.wrote.copy() if self.wrote is not None else Ranges()

    def cancel(self) -> None:
        """Ask the lanes to finish what is in flight and stop."""
        with self._lock:
            self.is_cancelled = True
            self.generation += 1
        self.wake()

    def everything_flushed(self) -> None:
        """Note that a flush after the last chunk has succeeded."""
        with self._lock:
            chunks = [*self._flushing, *self._landed]
            self._flushing, self._landed = [], []
            self._unflushed = self._being_flushed = 0
        self.on_durable([(chunk.offset, chunk.length) for chunk in chunks])

    def counted(self, offset: int, length: int) -> int:
        """Return how many of these bytes belong to the source (padding does not)."""
        return max(0, min(offset + length, self.geometry.size) - offset)

    @property
    def zero_size(self) -> int:
        """The most that one request makes zeroes; where the server can't, they are written."""
        return self.geometry.zero_size if self.can_zero else self.geometry.request_size

    def should_hurry(self) -> bool:
        """Whether a flush must begin now, so that nobody has to wait for it."""
        return self.hold_at is not None and self._unflushed >= self.hold_at // 4

    def must_wait(self) -> bool:
        """Whether so much waits for a flush that nothing more may be sent before it."""
        return self.hold_at is not None and self._unflushed + self._being_flushed >= self.hold_at

    @property
    def is_stopping(self) -> bool:
        """Whether no new request may be sent."""
        return self.is_cancelled or self.error is not None

    @property
    def has_todo(self) -> bool:
        """Whether a new lane would find something to do."""
        return bool(self._todo) and not (self.is_stopping or self.is_paused)

    @property
    def is_complete(self) -> bool:
        """Whether everything has landed."""
        with self._lock:
            return not self._todo and not self._live and not self.is_stopping

    @property
    def remaining(self) -> int:
        """Bytes that nobody has examined yet."""
        known = self._resumed + self._elsewhere + self._sum.examined
        return max(0, self.geometry.size - known)

    def bytes(self) -> Bytes:
        """Return what has landed so far."""
        total = self.geometry.size
        with self._lock:
            now = _Sum()
            for part in (self._sum, *self._live):
                now.add(part)  # type: ignore[arg-type]  # the same five fields
            retried = self._retried
        unknown = total - self._resumed - self._elsewhere - now.examined
        return Bytes(
            total=total,
            data=max(now.data + unknown, now.copied),
            copied=now.copied,
            zero=now.zero,
            skipped=now.skipped,
            resumed=self._resumed,
            retried=retried,
        )

    def _retry(self, chunk: Chunk) -> None:
        self._retried += chunk.copied
        if self.wrote is not None:
            self.wrote.add(chunk.offset, chunk.length)  # of what was on its way nothing is known
        self._todo.appendleft(_Range(chunk.offset, chunk.end, chunk.is_there))
