"""What copying in order waits for: an end, a stream, and being stopped, all at once.

Each such copy runs in a thread of its own and can be cancelled while either side keeps still.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread

from v2v_async.copy.ends import End
from v2v_async.copy.pipe import Stream
from v2v_async.errors import ConnectionLostError, CopyError, NbdError, RequestError
from v2v_async.handle import DIRECTION_READ, DIRECTION_WRITE, Completion, ExportInfo

# nbdkit 1.32 aborts when a client goes with requests on their way (shared/FACTS.md), but who
# cancels a copy wants it to end.
_DRAIN_S = 1.0

Landed = Callable[[int], None]
"""Called in the copying thread with the number of bytes that have arrived since the last call."""


class Pump:
    """A copy of its own kind (:meth:`copy`), with at most one end that answers later."""

    def __init__(self, end: End | None, wake_fd: int) -> None:
        self._end = end
        self._wake_fd = wake_fd
        self._in_flight = 0

    def run(self) -> int:
        """Copy; return the length in bytes. Nothing is in flight then, unless a server hangs."""
        try:
            return self.copy()
        finally:
            self._drain()

    def copy(self) -> int:
        """Do it."""
        raise NotImplementedError

    @property
    def in_flight(self) -> int:
        """Requests that have not been answered."""
        return self._in_flight

    def send(self, request: Callable[[Completion], None], noted: Callable[[int], None]) -> None:
        """Send a request; ``noted`` gets its errno, during this call or later, and sends nothing.

        Raises:
            ConnectionLostError, UnsupportedError: it can't be sent.
        """

        def done(error: Any) -> int:
            self._in_flight -= 1
            noted(error.value)
            return 1

        self._in_flight += 1
        try:
            request(done)
        except NbdError:
            self._in_flight -= 1
            raise

    def wait(self, stream: Stream | None = None, events: int = 0) -> bool:
        """Wait until something happens; return whether it is the stream.

        Raises:
            ConnectionLostError: the end's server has gone.
        """
        poll = select.poll()
        poll.register(self._wake_fd, select.POLLIN)
        if stream is not None and events:
            poll.register(stream.fd, events)
        fd = self._register(poll)
        ready = dict(poll.poll())
        if self._wake_fd in ready:
            raise _Stopped
        if fd in ready:
            self._notify(ready[fd])
        return stream is not None and stream.fd in ready

    def refused(self, op: str, offset: int, length: int, code: int) -> NbdError | CopyError:
        """Return the error for a request that was answered with an errno."""
        if self._end is not None and self._end.is_lost:
            return _gone()
        name = errno.errorcode.get(code, str(code))
        reason = f"{os.strerror(code)} ({name})"
        cause = RequestError(op, offset=offset, length=length, reason=reason, errno=code)
        error = CopyError(cause.message, offset=offset)
        error.__cause__ = cause
        return error

    def _register(self, poll: select.poll) -> int:
        """Poll for what the end waits for; return its descriptor, -1 where there is nothing."""
        if self._end is None or not self._in_flight:
            return -1
        if self._end.is_lost:
            raise _gone()
        fd = self._end.fileno()
        if fd >= 0:
            direction = self._end.direction()
            events = select.POLLIN if direction & DIRECTION_READ else 0
            poll.register(fd, events | (select.POLLOUT if direction & DIRECTION_WRITE else 0))
        return fd

    def _notify(self, events: int) -> None:
        assert self._end is not None
        direction = self._end.direction()
        if events & ~select.POLLOUT and direction & DIRECTION_READ:
            self._end.notify_readable()
        elif direction & DIRECTION_WRITE:
            self._end.notify_writable()
        if self._end.is_lost:
            raise _gone()

    def _drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_S
        try:
            while self._in_flight and self._end is not None and not self._end.is_lost:
                poll = select.poll()
                fd = self._register(poll)
                left_s = deadline - time.monotonic()
                if fd < 0 or left_s <= 0:
                    return
                for _, events in poll.poll(left_s * 1000):
                    self._notify(events)
        except NbdError:
            return  # what happened first is being raised


def _gone() -> ConnectionLostError:
    return ConnectionLostError(
        "the server closed the connection", hint="see what the server says about it"
    )


class _Stopped(Exception):
    """The copy was cancelled."""


async def run_pump(make: Callable[[int], Pump]) -> int:
    """Run a copy in a thread and return its length; cancellation stops it and waits for it.

    ``make`` gets the descriptor that wakes it.
    """
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    lengths: list[int] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            lengths.append(make(wake_fd).run())
        except Exception as error:  # raised again outside the task group, which would wrap it
            failures.append(error)

    async def wake_when_cancelled() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            os.eventfd_write(wake_fd, 1)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wake_when_cancelled)
            await anyio.to_thread.run_sync(run)
            tasks.cancel_scope.cancel()
    finally:
        os.close(wake_fd)
    await anyio.lowlevel.checkpoint_if_cancelled()
    if failures:
        raise failures[0]
    return lengths[0]


def fitting(request_size: int, info: ExportInfo) -> int:
    """Fit a request size to the block sizes of an end."""
    size = min(request_size, info.maximum_block)
    return max(size // info.minimum_block, 1) * info.minimum_block
