"""A place for one request on its way, with its buffers."""

from __future__ import annotations

from collections import deque
from typing import Any

from v2v_async.copy.disk import Chunk
from v2v_async.copy.plan import Piece
from v2v_async.handle import Completion, ZeroTest


class Slot:
    """One request on its way, with buffers of its own that are reused.

    ``pending`` counts what has been asked for and not answered, ``code`` is the errno of an answer
    that was not good. ``state`` belongs to the lane's kind.
    """

    __slots__ = (
        "attempts",
        "buffers",
        "chunk",
        "code",
        "has_asked_zeroes",
        "held",
        "is_zero",
        "kind",
        "length",
        "offset",
        "on_answer",
        "pending",
        "pieces",
        "sent",
        "size",
        "state",
        "views",
        "words",
    )

    def __init__(self, size: int, buffers: int, ready: deque[Slot]) -> None:
        self.chunk = Chunk(0, 0)
        self.offset = self.length = self.attempts = self.code = self.pending = 0
        self.kind: str = "data"
        self.state = "free"
        self.sent = 0.0
        self.has_asked_zeroes = False
        self.pieces: list[Piece] = []
        self.grow(size, buffers)

        # Made once for all requests of the slot: a closure for each would cost more than the rest.
        def on_answer(error: Any) -> int:
            code = error.value
            if code:
                self.code = code
            self.pending -= 1
            if not self.pending:
                ready.append(self)
            return 1

        self.on_answer: Completion = on_answer

    def grow(self, size: int, buffers: int) -> None:
        """Give it buffers of ``size`` bytes; what they held is gone."""
        self.size = size
        self.held = size * buffers
        self.buffers = [bytearray(size) for _ in range(buffers)]
        self.views = [memoryview(buffer) for buffer in self.buffers]
        self.words = self.views[0].cast("Q") if size % 8 == 0 else None
        self.is_zero = ZeroTest(self.buffers[0])
