"""Long reading in a worker thread: watched, told, and stopped when the run is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from v2v_async.events import EventType, Reporter
from v2v_async.units import format_size

T = TypeVar("T")

_EVENT_EVERY_S = 1.0
_MESSAGES_EVERY = 10
"""Events between two lines for people: nobody reads one a second in a log."""


class Stopped(Exception):
    """Raised in the thread, out of :meth:`Work.advance`."""


class Work:
    """What a thread is at. The thread calls :meth:`begin` and :meth:`advance`."""

    def __init__(self) -> None:
        self.type: EventType = "progress"
        self.doing = "reading"
        self.file = ""
        self.done = 0
        self.total: int | None = None
        self._stop = threading.Event()

    def begin(
        self, doing: str, file: str, total: int | None, type_: EventType = "progress"
    ) -> None:
        """Note what it does with which file, and how many bytes of it there are to read."""
        self.doing, self.file, self.total, self.type, self.done = doing, file, total, type_, 0

    def advance(self, count: int) -> None:
        """Note that ``count`` bytes more are done.

        Raises:
            Stopped: they were the last ones.
        """
        self.done += count
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Have the thread stop."""
        self._stop.set()

    @property
    def text(self) -> str:
        """It, for people."""
        done = format_size(self.done)
        if not self.total:
            return f"{self.doing} ‘{self.file}’: {done}"
        percent = min(100 * self.done // self.total, 100)
        return f"{self.doing} ‘{self.file}’: {percent} %, {done} of {format_size(self.total)}"


async def in_thread(function: Callable[[], T], work: Work, reporter: Reporter) -> T:
    """Run ``function`` in a thread and return what it returns; tell how ``work`` goes.

    Cancelled, it waits for the thread, which stops at its next :meth:`Work.advance`.
    """
    result: list[T] = []
    failure: list[Exception] = []
    async with anyio.create_task_group() as group:
        group.start_soon(_watch, work, reporter)
        try:
            result.append(await anyio.to_thread.run_sync(function))
        except Exception as error:
            failure.append(error)  # not raised here: it would come out as a group of one
        group.cancel_scope.cancel()
    if failure:
        await anyio.lowlevel.checkpoint()
        raise failure[0]
    return result[0]


async def _watch(work: Work, reporter: Reporter) -> None:
    seconds = 0
    try:
        while True:
            await anyio.sleep(_EVENT_EVERY_S)
            seconds += 1
            reporter.emit(
                work.type,
                details={"file": work.file, "compared": work.done, "total": work.total}
                if work.type == "verifying"
                else {"file": work.file, "read": work.done, "total": work.total},
            )
            if seconds % _MESSAGES_EVERY == 0:
                reporter.message(work.text)
    finally:
        work.stop()
