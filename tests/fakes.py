"""A pair of disks in memory that speak as :class:`v2v_async.handle.Handle` does.

They answer in any order that a test chooses, and tell awkward extents. Real servers are in
``tests/integration``; these are for what no real server does on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int
from dataclasses import dataclass, field
from typing import Any

from v2v_async.handle import Completion, Entries

EIO = 5


@dataclass
class FakeHandle:
    """An export of ``content``. ``extents`` answers a block-status request."""

    content: bytearray
    extents: Callable[[int, int], Entries | None] = lambda offset, length: [(length, 0)]
    fails: Callable[[str, int, int], int] = lambda op, offset, length: 0
    block: int = 1
    waiting: list[Callable[[], None]] = field(default_factory=list)
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    bytes_waiting: int = 0

    def read(self, buffer: Any, offset: int, done: Completion) -> None:
        length = len(buffer)
        self._check("read", offset, length)

        def act() -> None:
            _fill(buffer, self.content[offset : offset + length])

        self._later("read", offset, length, act, done)

    def write(self, buffer: Any, offset: int, done: Completion) -> None:
        length = len(buffer)
        self._check("write", offset, length)

        def act() -> None:
            # What is in the buffer when the server gets to it: reuse too early would show.
            self.content[offset : offset + length] = buffer.to_bytearray()

        self._later("write", offset, length, act, done)

    def zero(self, length: int, offset: int, done: Completion) -> None:
        self._check("zero", offset, length)

        def act() -> None:
            self.content[offset : offset + length] = bytes(length)

        self._later("zero", offset, length, act, done)

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        entries = self.extents(offset, length)
        if entries is not None:
            told(entries)
        code = EIO if entries is None else 0
        self.waiting.append(lambda: _complete(done, code))

    def _check(self, op: str, offset: int, length: int) -> None:
        assert length > 0, op
        assert offset % self.block == 0, (op, offset)
        assert length % self.block == 0 or op == "read", (op, length)
        assert offset + length <= len(self.content), (op, offset, length)
        self.requests.append((op, offset, length))

    def _later(
        self, op: str, offset: int, length: int, act: Callable[[], None], done: Completion
    ) -> None:
        code = self.fails(op, offset, length)
        self.bytes_waiting += length

        def complete() -> None:
            self.bytes_waiting -= length
            if code == 0:
                act()
            _complete(done, code)

        self.waiting.append(complete)


def _complete(done: Completion, code: int) -> None:
    assert done(c_int(code)) == 1


def _fill(buffer: Any, content: bytearray) -> None:
    """Write into the memory that an ``nbd.Buffer`` shares (it has no public way to it)."""
    memoryview(buffer._o)[:] = content
