"""What a supervisor has in a worker process, from when it takes that in until it loses it.

It ends when the supervisor says so, when it is not heard of for the length of the lease, and with
the worker. Guests are then suspended: their servers end, and a later attempt can go on.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal

import anyio
import anyio.abc
import anyio.to_thread

from v2v_async.batch.cluster.attempt import Attempt, OwnDirectory
from v2v_async.batch.cluster.outbox import Outbox
from v2v_async.batch.guest_work import tombstone
from v2v_async.batch.pool import Order, Pool
from v2v_async.batch.retry import named
from v2v_async.errors import V2VError
from v2v_async.events import Reporter

OpenWorkshop = Callable[[Reporter], AbstractAsyncContextManager[Pool]]
"""Opens what all guests of a worker process share: pool.py's, but for tests. It is pickled."""

Kept = Literal["", "converted", "done"]
"""What is kept of a guest in a v2v directory."""

_MOST_LOGS = 64
_LONGEST_LOG = 256 * 1024


class Session:
    """Made in the loop of the guests, where all of it runs but :meth:`hold`."""

    def __init__(self, run: str, lease_s: float, send: Callable[[list[str]], None]) -> None:
        self.run = run
        self._lease_s = lease_s
        self._outbox = Outbox(run, send)
        self._reporter = Reporter(self._outbox.event, run)
        self._heard = self.clock()
        self._workshop: Pool | None = None
        self._group: anyio.abc.TaskGroup | None = None
        self._attempts: dict[str, Attempt] = {}
        self._places: dict[str, Order] = {}
        self._own: set[Path] = set()
        self._holds: dict[str, threading.Event] = {}
        self._closing = anyio.Event()
        self.ended = anyio.Event()

    async def live(
        self, open_workshop: OpenWorkshop, *, task_status: anyio.abc.TaskStatus[None]
    ) -> None:
        """Be there until it is closed or the lease ends."""
        is_open = False
        try:
            async with anyio.create_task_group() as sending:
                sending.start_soon(self._outbox.keep_sending, time.time)
                async with (
                    open_workshop(self._reporter) as self._workshop,
                    anyio.create_task_group() as self._group,
                ):
                    is_open = True
                    task_status.started()
                    await self._lease()
                    self._group.cancel_scope.cancel()
                sending.cancel_scope.cancel()
        except Exception as error:
            if not is_open:
                raise  # to who opens the session
            self._reporter.warning(f"what a worker did has not ended well: {named(error)}")
        finally:
            self._outbox.flush(time.time())
            for hold in self._holds.values():
                hold.set()
            self.ended.set()

    def close(self) -> None:
        """End it; ``ended`` tells when that is done."""
        self._closing.set()

    def forget_all(self) -> None:
        """Forget which guests are done: the supervisor has noted it."""
        for path in self._own:
            tombstone(path).unlink(missing_ok=True)

    @staticmethod
    def clock() -> float:
        """Return the time by which leases are measured here (s)."""
        return time.monotonic()

    def renew(self, confirmed: float) -> float | None:
        """Note that the supervisor is there; return the time, or None when the lease has ended.

        ``confirmed`` is what the last answer said that the supervisor has. The lease goes on from
        then and not from now: a renewal may have been under way for long, as to a machine that was
        out of reach, and who sent it may have given us up since. One never revives a lease.
        """
        if self._left_s() <= 0:
            return None
        self._heard = max(self._heard, confirmed)
        return self.clock()

    def _left_s(self) -> float:
        return self._heard + self._lease_s - self.clock()

    async def _lease(self) -> None:
        while (left := self._left_s()) > 0:
            with anyio.move_on_after(left):
                await self._closing.wait()
                return

    # Places that dask gives.

    def expect_hold(self, name: str) -> threading.Event:
        """Say that a turn has come; the event that ends it is returned."""
        ends = self._holds.setdefault(name, threading.Event())
        if self.ended.is_set():
            ends.set()
        self._outbox.tell(answer="held", of=name)
        return ends

    def release(self, name: str) -> None:
        """End a turn, even one that has not come yet."""
        self._holds.setdefault(name, threading.Event()).set()

    # Guests.

    async def begin(
        self, name: str, guest: str, order: Order, *, is_shared: bool, state: str
    ) -> None:
        """Begin an attempt. ``state``: what is known of an earlier one that was elsewhere."""
        self.know(name, guest, order, is_shared=is_shared, state=state)
        await self._attempts[name].begin()

    def know(self, name: str, guest: str, order: Order, *, is_shared: bool, state: str) -> None:
        """Know of an attempt without its servers, to remove what it has left."""
        assert self._workshop is not None
        assert self._group is not None
        own = None
        if not is_shared:
            own = OwnDirectory(order.path, tombstone(order.path))
            _have_directory(order.path, state)
            self._own.add(order.path)
        reporter = self._reporter.for_guest(guest)
        work = self._workshop.work(order, reporter)
        self._places[name] = order
        self._attempts[name] = Attempt(name, work, self._outbox, reporter, self._group, own)

    def attempt(self, name: str) -> Attempt:
        """Return an attempt.

        Raises:
            V2VError: there is none of that name.
        """
        try:
            return self._attempts[name]
        except KeyError:
            raise V2VError("the worker does not know this attempt: it has been restarted") from None

    def set_rates(self, rates: Mapping[str, int]) -> None:
        """Limit the copies here."""
        assert self._workshop is not None
        self._workshop.set_rates(rates)

    async def forget(self, name: str, *, with_logs: bool) -> dict[str, bytes]:
        """Forget an attempt that has ended; return the ends of its logs, which go from here."""
        self._attempts.pop(name, None)
        order = self._places.pop(name, None)
        if order is None or not with_logs:
            return {}
        return await anyio.to_thread.run_sync(_take_logs, order.logs)


def _have_directory(path: Path, state: str) -> None:
    """Make a v2v directory on this machine's own disk, or go on with the one that is there.

    Its name can be guessed, in a directory where everybody may make one.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.geteuid():
        raise V2VError(f"‘{path}’ on the worker is not a directory of ours")
    file = path / "state.json"
    if state and not file.exists():
        file.write_text(state)


def _take_logs(folder: Path) -> dict[str, bytes]:
    """Return the ends of the logs of a folder, and remove it."""
    found: dict[str, bytes] = {}
    for file in sorted(folder.rglob("*"))[:_MOST_LOGS]:
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as log:
                log.seek(max(0, file.stat().st_size - _LONGEST_LOG))
                found[str(file.relative_to(folder))] = log.read()
    shutil.rmtree(folder, ignore_errors=True)
    return found


def kept(path: Path) -> Kept:
    """Tell what is kept of a guest in a v2v directory here."""
    if tombstone(path).exists():
        return "done"
    return "converted" if (path / "metadata.out").exists() else ""
