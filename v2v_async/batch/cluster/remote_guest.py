"""One attempt at one guest, on a worker of a cluster.

::

    convert, reopen ──> a worker is chosen, and has the servers ──> prepare ──> copy … ──> finalize
                              │ it dies, or a server does
                              └──> the block of servers() ends with the reason; no call goes on

What is kept of a guest between attempts is in its v2v directory. Where the workers share that with
the supervisor, any of them goes on with it; where not, only the machine that has it does, and when
that is gone the guest is converted again.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from v2v_async.batch.cluster.answers import Answer, either
from v2v_async.batch.cluster.cluster import Cluster
from v2v_async.batch.cluster.errors_sent import error_sent
from v2v_async.batch.cluster.placement import COPIES
from v2v_async.batch.cluster.session import Kept, kept
from v2v_async.batch.cluster.workers import Worker
from v2v_async.batch.pool import Order
from v2v_async.errors import V2VError, most_telling
from v2v_async.events import Reporter
from v2v_async.steps import stop_recorded
from v2v_async.v2vdir import V2VDir, boot_id

# What is under way on a worker stops within its servers' grace, twice.
_STOP_TIMEOUT_S = 60.0
_UNDO_TIMEOUT_S = 90.0


class RemoteGuest:
    """Implements :class:`v2v_async.batch.runner.GuestWork`. Construction does no I/O."""

    def __init__(self, cluster: Cluster, order: Order, reporter: Reporter) -> None:
        self._cluster = cluster
        self._order = order
        self._reporter = reporter
        self._guest = reporter.guest or ""
        self._name = uuid.uuid4().hex
        self._worker: Worker | None = None
        self._is_begun = anyio.Event()
        self._ended = Answer()
        self._is_leaving = False
        self._is_done = False
        self._paths = (order.path, order.logs)

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[None]:
        """See :class:`GuestWork`."""
        listening = self._cluster.listening
        with (
            listening(f"ended {self._name}", self._ended),
            listening(f"state {self._name}", self._keep_state),
        ):
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._watch)
                    try:
                        yield
                    finally:
                        with anyio.CancelScope(shield=True):
                            await self._leave()
                        group.cancel_scope.cancel()
            except BaseExceptionGroup as problems:
                raise most_telling(problems) from None

    async def convert(self) -> None:
        """See :class:`GuestWork`."""
        async with self._cluster.placed(self._guest) as worker:
            await self._begin(worker)
            await self._call("convert")

    async def reopen(self) -> bool:
        """See :class:`GuestWork`."""
        # What nobody is there to tell of may only be out of reach for a moment.
        await self._cluster.worker_for(None, None)
        among, is_done = await self._keepers()
        if is_done:
            await self._forget_here()
            return False
        if among:
            await self._begin(await self._cluster.worker_for(None, among))
            is_needed = bool(await self._call("reopen"))
            self._is_done = not is_needed
            return is_needed
        self._reporter.warning(
            "no worker that is there has what an earlier one had converted, since "
            f"‘{self._order.path.parent}’ is not shared: the guest is converted again"
        )
        await self.convert()
        return True

    async def prepare(self) -> None:
        """See :class:`GuestWork`."""
        await self._call("prepare")

    async def copy(self, disk: int) -> None:
        """See :class:`GuestWork`."""
        assert self._worker is not None
        groups = self._order.copying.groups
        async with self._cluster.holding(self._worker, COPIES, self._guest):
            self._cluster.rates.count(self._worker.address, groups, 1)
            try:
                await self._call("copy", disk)
            finally:
                self._cluster.rates.count(self._worker.address, groups, -1)

    async def finalize(self) -> list[str]:
        """See :class:`GuestWork`."""
        made: list[str] = await self._call("finalize")
        self._is_done = True
        return made

    async def abandon(self) -> bool:
        """See :class:`GuestWork`."""
        worker = self._worker
        if worker is None or worker.lost.is_set():
            await self._end_here()
            among, is_done = await self._keepers()
            if is_done:
                # What is kept of its state here may be of before its end, and name what stays.
                await self._forget_here()
                return True
            if not among and not self._order.path.exists():
                return False  # nothing of it was ever made
            worker = await self._cluster.worker_for(None, among or None)
            self._name = uuid.uuid4().hex
            self._paths = await self._paths_on(worker)
            await self._cluster.ask(worker, "know", **self._to_begin())
        is_finalized = bool(await self._undo(worker, "abandon"))
        self._is_done = True
        await self._forget(worker)
        return is_finalized

    async def suspend(self) -> None:
        """See :class:`GuestWork`."""
        worker = self._worker
        if worker is None or worker.lost.is_set():
            # Other things that such a worker leaves are removed by the attempt that goes on.
            await self._end_here()
        else:
            await self._undo(worker, "suspend")
            await self._forget(worker)

    # Where it is worked on.

    async def _keepers(self) -> tuple[list[str], bool]:
        """Return the workers that can go on with what is kept of the guest, and if it is done.

        Where they share what is kept, they find out themselves that it is done.
        """
        cluster, path = self._cluster, self._order.path
        sharing: list[str] = []
        found: dict[str, Kept] = {}

        async def look(worker: Worker) -> None:
            try:
                if await cluster.shares(worker, path):
                    sharing.append(worker.address)
                else:
                    own = worker.own_path(path, cluster.run)
                    found[worker.address] = await cluster.ask(worker, "keeps", path=own)
            except V2VError:
                return  # it has just gone

        async with anyio.create_task_group() as group:
            for worker in cluster.workers:
                group.start_soon(look, worker)
        here = await anyio.to_thread.run_sync(kept, path)
        if sharing and here:
            return sharing, False
        keeping = [address for address, what in found.items() if what == "converted"]
        return keeping or sharing, "done" in (here, *found.values())

    async def _paths_on(self, worker: Worker) -> tuple[Path, Path]:
        """Return the v2v directory and the folder of logs as a worker has them."""
        cluster, path, logs = self._cluster, self._order.path, self._order.logs
        if not await cluster.shares(worker, path):
            path = worker.own_path(path, cluster.run)
        if not await cluster.shares(worker, logs):
            logs = worker.own_path(logs, cluster.run, ".log")
        return path, logs

    def _to_begin(self) -> dict[str, Any]:
        path, logs = self._paths
        is_shared = path == self._order.path
        return {
            "name": self._name,
            "guest": self._guest,
            "order": replace(self._order, path=path, logs=logs),
            "is_shared": is_shared,
            "state": "" if is_shared else _read(self._order.path / "state.json"),
        }

    async def _end_here(self) -> None:
        """End what a worker that is gone has left running on this machine."""
        v2vdir = V2VDir(self._order.path)
        if v2vdir.state_file.exists() and v2vdir.state.boot_id == boot_id():
            await stop_recorded(v2vdir)

    async def _begin(self, worker: Worker) -> None:
        """Have the servers on a worker, for good: the attempt goes where they are."""
        self._paths = await self._paths_on(worker)
        self._worker = worker
        worker.load.guests += 1
        self._is_begun.set()
        # A worker that is asked, and whose answer is not waited for, would go on alone.
        with anyio.CancelScope(shield=True):
            await self._cluster.ask(worker, "begin", **self._to_begin())

    async def _watch(self) -> None:
        """Raise what ends the attempt on its worker."""
        await self._is_begun.wait()
        assert self._worker is not None
        await either(self._ended.come, self._worker.lost)
        if not self._is_leaving:
            raise self._why(self._worker)

    def _why(self, worker: Worker) -> V2VError:
        """Return what ended the attempt."""
        told = self._ended.told
        if told is not None and told["error"] is not None:
            error = error_sent(told["error"])
            error.log = self._fetched(error.log)
            return error
        if worker.lost.is_set():
            return worker.gone()
        return V2VError(
            f"the worker {worker.label} has stopped its work on this guest",
            hint="it has not heard from this supervisor for too long, or is being stopped itself",
        )

    async def _leave(self) -> None:
        """Have the servers stopped."""
        self._is_leaving = True
        worker = self._worker
        if worker is None:
            return
        if not self._ended.come.is_set() and not worker.lost.is_set():
            try:
                await self._cluster.ask(worker, "leave", name=self._name)
                with anyio.fail_after(_STOP_TIMEOUT_S):
                    await either(self._ended.come, worker.lost)
            except (V2VError, TimeoutError) as error:
                self._reporter.warning(f"its servers on {worker.label} may still run: {error}")
        worker.load.guests -= 1
        if self._is_done:
            await self._forget(worker)

    # What is asked of a worker.

    async def _call(self, step: str, *arguments: Any) -> Any:
        """Have the worker do a part, and return what came of it."""
        worker, cluster = self._worker, self._cluster
        assert worker is not None
        call = uuid.uuid4().hex
        answer = Answer()
        with cluster.listening(f"done {call}", answer):
            try:
                with anyio.CancelScope(shield=True):
                    await cluster.ask(
                        worker, "call", name=self._name, call=call, step=step, arguments=arguments
                    )
                # Where it fails, the attempt ends, and so does this wait.
                await answer.come.wait()
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP_TIMEOUT_S):
                    await self._stop(worker, call, answer)
                raise
        assert answer.told is not None
        return answer.told["result"]

    async def _stop(self, worker: Worker, call: str, answer: Answer) -> None:
        """Have the worker stop a call, and wait until it has."""
        if self._ended.come.is_set() or worker.lost.is_set():
            return
        try:
            await self._cluster.ask(worker, "cancel", name=self._name, call=call)
        except V2VError:
            return  # leaving stops it too, or says what is in the way
        await either(answer.come, self._ended.come, worker.lost)

    async def _undo(self, worker: Worker, step: str) -> Any:
        """Have the worker remove what was made, and return what it says of it."""
        call = uuid.uuid4().hex
        answer = Answer()
        with self._cluster.listening(f"done {call}", answer):
            await self._cluster.ask(worker, "undo", name=self._name, call=call, step=step)
            with anyio.move_on_after(_UNDO_TIMEOUT_S):
                await either(answer.come, worker.lost)
        if answer.told is None:
            raise worker.gone()
        if answer.told["error"] is not None:
            raise error_sent(answer.told["error"])
        return answer.told["result"]

    async def _forget(self, worker: Worker) -> None:
        """Have the worker forget the attempt, and fetch its logs where they are not shared."""
        path, logs = self._paths
        is_far = logs != self._order.logs
        try:
            found = await self._cluster.ask(worker, "forget", name=self._name, with_logs=is_far)
            await anyio.to_thread.run_sync(partial(_write_logs, self._order.logs, found))
        except (V2VError, OSError) as error:
            self._reporter.warning(f"the logs of {worker.label} could not be fetched: {error}")
        if self._is_done and path != self._order.path:
            await self._forget_here()

    async def _forget_here(self) -> None:
        """Remove what was kept of the state of a directory that is elsewhere."""
        await anyio.to_thread.run_sync(partial(shutil.rmtree, ignore_errors=True), self._order.path)

    def _fetched(self, log: Path | None) -> Path | None:
        """Return where a log of the worker will be found here."""
        path, logs = self._paths
        for folder in (path / "log", logs):
            if log is not None and log.is_relative_to(folder):
                return self._order.logs / log.relative_to(folder)
        return log

    def _keep_state(self, told: dict[str, Any]) -> None:
        """Keep what a worker says it has made, for the day when that worker is gone."""
        path = self._order.path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path / ".state.json"
        temporary.write_text(told["text"])
        temporary.replace(path / "state.json")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write_logs(folder: Path, found: dict[str, bytes]) -> None:
    for name, content in found.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
