"""A pair of disks in memory that speak as :class:`v2v_async.handle.Handle` does.

They answer in any order that a test chooses, and tell awkward extents. Real servers are in
``tests/integration``; these are for what no real server does on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass, field
from random import Random

from v2v_async.errors import ConnectionLostError, RequestError
from v2v_async.handle import Completion, Entries

EIO, ENOTSUP, ENOTCONN = 5, 95, 107


@dataclass
class Waiting:
    """A request that the server has not answered."""

    act: Callable[[], None]
    done: Completion
    code: int = 0
    length: int = 0


@dataclass
class FakeHandle:
    """An export of ``content``. ``extents`` answers a block-status request."""

    content: bytearray
    extents: Callable[[int, int], Entries | None] = lambda offset, length: [(length, 0)]
    fails: Callable[[str, int, int], int] = lambda op, offset, length: 0
    block: int = 1
    is_fast: bool = True
    is_lost: bool = False
    flush_to: bytearray | None = None
    waiting: list[Waiting] = field(default_factory=list)
    requests: list[tuple[str, int, int]] = field(default_factory=list)

    # What a lane calls.

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        length = len(view)

        def act() -> None:
            view[:] = self.content[offset : offset + length]

        self._later("read", offset, length, act, done)

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        length = len(view)

        def act() -> None:
            # What is in the buffer when the server gets to it: reuse too early would show.
            self.content[offset : offset + length] = view

        self._later("write", offset, length, act, done)

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        def act() -> None:
            self.content[offset : offset + length] = bytes(length)

        self._later("zero", offset, length, act, done)
        if only_fast and not self.is_fast:
            self.waiting[-1].code = ENOTSUP

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        self._check_connection()
        entries = self.extents(offset, length)
        act = (lambda: told(entries)) if entries is not None else _nothing
        self.waiting.append(Waiting(act, done, 0 if entries is not None else EIO))

    def flush(self, done: Completion) -> None:
        def act() -> None:
            if self.flush_to is not None:
                self.flush_to[:] = self.content

        self._check_connection()
        self.waiting.append(Waiting(act, done))

    def flush_now(self) -> None:
        self._check_connection()
        if self.flush_to is not None:
            self.flush_to[:] = self.content

    def fileno(self) -> int:
        return -1

    def direction(self) -> int:
        return 0

    def notify_readable(self) -> None:
        raise AssertionError("nothing to poll")

    def notify_writable(self) -> None:
        raise AssertionError("nothing to poll")

    def close(self, *, politely: bool = True) -> None:
        assert self.is_lost or not self.waiting, "closed with requests in flight"

    # The same, waiting for the answer.

    def read_now(self, length: int, offset: int) -> bytearray:
        self._now("read", offset, length)
        return bytearray(self.content[offset : offset + length])

    def write_now(self, view: memoryview, offset: int) -> None:
        self._now("write", offset, len(view))
        self.content[offset : offset + len(view)] = view

    def zero_now(
        self, length: int, offset: int, *, allocate: bool = False, only_fast: bool = False
    ) -> None:
        self._now("zero", offset, length)
        if only_fast and not self.is_fast:
            raise RequestError("zero", offset=offset, length=length, reason="", errno=ENOTSUP)
        self.content[offset : offset + length] = bytes(length)

    def extents_now(self, length: int, offset: int) -> Entries:
        entries = None if self.is_lost else self.extents(offset, length)
        if entries is None:
            raise RequestError("extents", offset=offset, length=length, reason="", errno=EIO)
        return entries

    def sever(self) -> None:
        self.is_lost = True

    def _now(self, op: str, offset: int, length: int) -> None:
        self._check_request(op, offset, length)
        code = ENOTCONN if self.is_lost else self.fails(op, offset, length)
        if code:
            raise RequestError(op, offset=offset, length=length, reason="", errno=code)

    # What a test calls.

    def answer(self, at: int) -> None:
        """Answer one of the waiting requests."""
        request = self.waiting.pop(at)
        if request.code == 0:
            request.act()
        assert request.done(c_int(request.code)) == 1

    def cut(self, random: Random) -> None:
        """Lose the connection: nobody knows which of the requests on their way were done."""
        self.is_lost = True
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            if request.code == 0 and random.random() < 0.5:
                request.act()
            assert request.done(c_int(ENOTCONN)) == 1

    @property
    def bytes_waiting(self) -> int:
        """Bytes of the requests that are on their way."""
        return sum(request.length for request in self.waiting)

    def _check_connection(self) -> None:
        if self.is_lost:
            raise ConnectionLostError("gone")

    def _check_request(self, op: str, offset: int, length: int) -> None:
        assert length > 0, op
        assert offset % self.block == 0, (op, offset)
        assert length % self.block == 0 or op == "read", (op, length)
        assert offset + length <= len(self.content), (op, offset, length)
        self.requests.append((op, offset, length))

    def _later(
        self, op: str, offset: int, length: int, act: Callable[[], None], done: Completion
    ) -> None:
        self._check_connection()
        self._check_request(op, offset, length)
        self.waiting.append(Waiting(act, done, self.fails(op, offset, length), length))


def _nothing() -> None:
    """Do nothing."""
