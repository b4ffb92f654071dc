"""Flushes a disk while it is copied, so that a server that dies, or we, lose little.

::

    landed ──enough bytes, or enough time──> flush ──> durable ──> remembered
              └ so much that lanes would have to wait for it: at once
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
import anyio.from_thread

from v2v_async.copy.connections import Connections, flush
from v2v_async.copy.disk import DiskCopy
from v2v_async.errors import NbdError

if TYPE_CHECKING:
    from v2v_async.copy.remembering import Memory

# What a server that dies may lose, and has to be copied again. The kernel writes back what is 30 s
# old by itself, so that a flush costs little then.
_EVERY_S = 30.0
_AFTER_LOSS_S = 2.0
# Between two flushes for what has landed: a small disk that is copied fast needs no more of them.
_PAUSE_S = 0.25


class Flushing:
    """The flushes of one disk but for the last. ``wake`` lets lanes look at it again."""

    def __init__(
        self,
        copy: DiskCopy,
        connections: Connections,
        memory: Memory | None,
        wake: Callable[[], None],
    ) -> None:
        self._copy = copy
        self._connections = connections
        self._memory = memory
        self._wake = wake
        self._every_s = _EVERY_S
        self._is_much = anyio.Event()
        copy.on_much = self._much

    def had_loss(self) -> None:
        """Flush more often from now on: the target was lost, and may be again."""
        self._every_s = _AFTER_LOSS_S

    async def run(self) -> None:
        """Flush whenever it is time, for ever."""
        copy, connections = self._copy, self._connections
        while True:
            await self._time_to_flush()
            epoch = copy.epoch
            witness = connections.witness(epoch)
            if not connections.has_witness:
                copy.wants_flush = True  # by the lane, on the only connection
                self._wake()
            elif witness is not None and copy.begin_flush():
                try:
                    await flush(witness)
                except NbdError:
                    self.had_loss()
                    copy.target_lost(epoch)  # the lanes will find out why
                    continue
                copy.flushed(epoch)
                if self._memory is not None:
                    self._wake()  # lanes may have waited for it
                    await self._memory.save()

    async def _time_to_flush(self) -> None:
        until = anyio.current_time() + _PAUSE_S
        left = self._every_s
        if self._memory is not None:
            left = min(left, self._memory.interval_s)
        while True:
            with anyio.move_on_after(left):
                await self._is_much.wait()
            is_much = self._is_much.is_set()
            self._is_much = anyio.Event()
            left = until - anyio.current_time()
            if left <= 0 or not is_much or self._copy.should_hurry():
                return

    def _much(self) -> None:
        """Called in a worker's thread."""
        anyio.from_thread.run_sync(lambda: self._is_much.set())
