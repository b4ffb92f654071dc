"""A thread that polls its lanes.

The bindings release the GIL while they work, so a few such threads reach nbdcopy's throughput where
one event loop for all connections reached two thirds of it (shared/FACTS.md).
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque

from v2v_async.copy.ends import End
from v2v_async.copy.lane import Lane, Side
from v2v_async.errors import ConnectionLostError, NbdError
from v2v_async.handle import DIRECTION_READ, DIRECTION_WRITE

# What is in flight when a copy ends early is waited for, since nbdkit 1.32 aborts otherwise;
# a server that never answers must not hold us for ever.
DRAIN_S = 5.0
_DRAIN_POLL_MS = 200
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


_EVENTS = {
    0: 0,
    DIRECTION_READ: select.POLLIN,
    DIRECTION_WRITE: select.POLLOUT,
    DIRECTION_READ | DIRECTION_WRITE: select.POLLIN | select.POLLOUT,
}


class Worker:
    """Drives the lanes given to it until :meth:`close`; :meth:`run` is the thread's body."""

    def __init__(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._new: deque[Lane] = deque()
        self._fds: dict[Lane, list[int]] = {}
        self._ends: dict[int, tuple[Lane, End, Side]] = {}
        self._registered: dict[int, int] = {}
        self._draining_since: dict[Lane, float] = {}
        self._timers: dict[Lane, float] = {}
        self._again: dict[Lane, None] = {}
        self._poll = select.poll()
        self._is_closing = False
        self._fd_lock = threading.Lock()
        self.load = 0

    # Called by the event loop's thread.

    def add(self, lane: Lane) -> None:
        """Give it a lane; the worker owns both connections until the lane is done."""
        self.load += 1
        self._new.append(lane)
        self.wake()

    def wake(self) -> None:
        """Make it look at its lanes again (after a cancel)."""
        with self._fd_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Let the thread end when its lanes are done."""
        self._is_closing = True
        self.wake()

    # The thread.

    def run(self) -> None:
        """Drive lanes until closed and done."""
        self._poll.register(self._wake_fd, select.POLLIN)
        try:
            while True:
                touched = self._wait()
                while self._new:
                    lane = self._new.popleft()
                    if self._begin(lane):
                        touched[lane] = None
                for lane in touched:
                    if lane in self._fds:
                        self._step(lane)
                if self._is_closing and not self._fds and not self._new:
                    return
        finally:
            for lane in [*self._fds, *self._new]:
                lane.disk.fail("copying", RuntimeError("the copy thread ended early"))
                lane.finished()
            with self._fd_lock:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _begin(self, lane: Lane) -> bool:
        fds = self._fds[lane] = []
        sides: tuple[tuple[End, Side], ...] = ((lane.source, "source"), (lane.target, "target"))
        try:
            for end, side in sides:
                fd = end.fileno()
                if fd >= 0:
                    fds.append(fd)
                    self._ends[fd] = (lane, end, side)
        except Exception as error:  # other lanes, perhaps of other guests, must not suffer for it
            lane.disk.fail("copying", error)
            self._finish(lane)
            return False
        return True

    def _step(self, lane: Lane) -> None:
        try:
            lane.advance()
            is_over = lane.is_done or self._has_drained_too_long(lane)
            if not is_over:
                for fd in list(self._fds[lane]):
                    self._register(fd)
        except Exception as error:  # a mistake of ours must fail the disk, not hang the run
            lane.disk.fail("copying", error)
            is_over = True
        if is_over:
            self._finish(lane)
            return
        if lane.wake_at is not None:
            self._timers[lane] = lane.wake_at
        elif lane in self._timers:
            del self._timers[lane]
        if lane.wants_again:
            self._again[lane] = None

    def _has_drained_too_long(self, lane: Lane) -> bool:
        if not lane.is_ending:
            return False
        since = self._draining_since.setdefault(lane, time.monotonic())
        if time.monotonic() - since <= DRAIN_S:
            return False
        # Whatever was on its way may still land, or not: what was not flushed is not relied on.
        lane.disk.target_lost(lane.epoch)
        return True

    def _finish(self, lane: Lane) -> None:
        for fd in self._fds.pop(lane):
            self._forget(fd)
        for known in (self._draining_since, self._timers, self._again):
            known.pop(lane, None)
        self.load -= 1
        lane.finished()

    def _forget(self, fd: int) -> None:
        if self._registered.pop(fd, None) is not None:
            self._poll.unregister(fd)
        self._ends.pop(fd, None)

    def _register(self, fd: int) -> None:
        """Poll for what the end of ``fd`` waits for now."""
        lane, end, side = self._ends[fd]
        direction = end.direction()
        events = _EVENTS[direction]
        if not direction and end.is_lost:
            self._lost(lane, side, fd, ConnectionLostError("the server closed the connection"))
        elif events != self._registered.get(fd):
            self._poll.register(fd, events)
            self._registered[fd] = events

    def _lost(self, lane: Lane, side: Side, fd: int, error: NbdError) -> None:
        # libnbd has closed it: another connection may have that number by the time the lane ends.
        self._fds[lane].remove(fd)
        self._forget(fd)
        lane.lose(side, error)
        # It ends when its other connection is quiet, perhaps at once.
        self._again[lane] = None

    def _timeout_ms(self) -> int | None:
        if self._again:
            return 0
        pauses = [_DRAIN_POLL_MS] if self._draining_since else []
        if self._timers:
            left = min(self._timers.values()) - time.monotonic()
            pauses.append(max(0, math.ceil(left * 1000)))
        return min(pauses) if pauses else None

    def _wait(self) -> dict[Lane, None]:
        """Wait until something happens; return the lanes that must be looked at."""
        ready = self._poll.poll(self._timeout_ms())
        touched: dict[Lane, None] = self._again
        self._again = {}
        for fd, events in ready:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                touched.update(dict.fromkeys(self._fds))
            elif (known := self._ends.get(fd)) is not None:
                touched[known[0]] = None
                self._notify(*known, fd, events)
        if self._timers:
            now = time.monotonic()
            touched.update({lane: None for lane, when in self._timers.items() if when <= now})
        touched.update(dict.fromkeys(self._draining_since))
        touched.update(self._again)
        return touched

    def _notify(self, lane: Lane, end: End, side: Side, fd: int, events: int) -> None:
        wanted = self._registered[fd]
        try:
            if events & _READABLE and wanted & select.POLLIN:
                end.notify_readable()
            else:
                # It may be sent to; or the server has gone while we were only sending.
                end.notify_writable()
        except NbdError as error:
            self._lost(lane, side, fd, error)
        except Exception as error:  # it ends in its next step
            lane.disk.fail("copying", error)
