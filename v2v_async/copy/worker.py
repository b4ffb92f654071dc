"""A thread that polls its lanes.

The bindings release the GIL while they work, so a few such threads reach nbdcopy's throughput where
one event loop for all connections reached two thirds of it (shared/FACTS.md).
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque

from v2v_async.copy.lane import Lane
from v2v_async.errors import NbdError
from v2v_async.handle import DIRECTION_READ, DIRECTION_WRITE, Handle

# What is in flight when a copy ends early is waited for, since nbdkit 1.32 aborts otherwise;
# a server that never answers must not hold us for ever.
DRAIN_S = 5.0
_DRAIN_POLL_MS = 200
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class Worker:
    """Drives the lanes given to it until :meth:`close`; :meth:`run` is the thread's body."""

    def __init__(self) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._new: deque[Lane] = deque()
        self._fds: dict[Lane, list[int]] = {}
        self._handles: dict[int, tuple[Lane, Handle, str]] = {}
        self._registered: dict[int, int] = {}
        self._draining_since: dict[Lane, float] = {}
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
                    touched.append(self._begin(self._new.popleft()))
                for lane in touched:
                    if lane in self._fds:
                        self._step(lane)
                if self._is_closing and not self._fds and not self._new:
                    return
        finally:
            for lane in [*self._fds, *self._new]:
                lane.disk.fail("copying", RuntimeError("the copy thread ended early"))
                lane.on_done()
            with self._fd_lock:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _begin(self, lane: Lane) -> Lane:
        self._fds[lane] = []
        for handle, side in ((lane.source, "source"), (lane.target, "target")):
            fd = handle.fileno()
            self._fds[lane].append(fd)
            self._handles[fd] = (lane, handle, side)
        return lane

    def _step(self, lane: Lane) -> None:
        try:
            lane.advance()
        except Exception as error:  # a mistake of ours must fail the disk, not hang the run
            lane.disk.fail("copying", error)
            self._finish(lane)
            return
        if lane.is_done or self._has_drained_too_long(lane):
            self._finish(lane)
            return
        for fd in self._fds[lane]:
            self._register(fd)

    def _has_drained_too_long(self, lane: Lane) -> bool:
        if not lane.disk.is_stopping:
            return False
        since = self._draining_since.setdefault(lane, time.monotonic())
        return time.monotonic() - since > DRAIN_S

    def _finish(self, lane: Lane) -> None:
        for fd in self._fds.pop(lane):
            if self._registered.pop(fd, None) is not None:
                self._poll.unregister(fd)
            del self._handles[fd]
        self._draining_since.pop(lane, None)
        self.load -= 1
        lane.on_done()

    def _register(self, fd: int) -> None:
        direction = self._handles[fd][1].direction()
        events = 0
        if direction & DIRECTION_READ:
            events |= select.POLLIN
        if direction & DIRECTION_WRITE:
            events |= select.POLLOUT
        if self._registered.get(fd) == events:
            return
        self._poll.register(fd, events)
        self._registered[fd] = events

    def _wait(self) -> list[Lane]:
        """Wait until something happens; return the lanes that must be looked at."""
        timeout_ms = _DRAIN_POLL_MS if self._draining_since else None
        touched: dict[Lane, None] = {}
        for fd, events in self._poll.poll(timeout_ms):
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                touched.update(dict.fromkeys(self._fds))
            elif (known := self._handles.get(fd)) is not None:
                touched[known[0]] = None
                self._notify(*known, events)
        return list(touched) or list(self._draining_since)

    def _notify(self, lane: Lane, handle: Handle, side: str, events: int) -> None:
        direction = handle.direction()
        try:
            if events & _READABLE and direction & DIRECTION_READ:
                handle.notify_readable()
            elif events & select.POLLOUT and direction & DIRECTION_WRITE:
                handle.notify_writable()
            elif events & _READABLE:
                # The server has gone while we were only sending.
                handle.notify_writable()
        except NbdError as error:
            lane.lost(side, error)
            self._finish(lane)
