"""What a worker process does for us: a thread with an event loop in which guests are worked on.

The thread lives as long as the process does or the plugin is there, and programs are started from
it: the kernel ends them when the *thread* that started them ends (prctl(2), PR_SET_PDEATHSIG), so
they die with a worker that is killed, and not with one of dask's own threads. And what guests do in
their loop never keeps dask's loop from saying that the worker is alive.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
from distributed import get_worker, secede
from distributed.diagnostics.plugin import WorkerPlugin

from v2v_async.batch.cluster.errors_sent import error_to_send
from v2v_async.batch.cluster.sealed import Sealed
from v2v_async.batch.cluster.session import OpenWorkshop, Session, kept
from v2v_async.batch.retry import named
from v2v_async.errors import V2VError

T = TypeVar("T")

NAME = "v2v-async"
# Guests that are told to stop have this long: their servers' grace, and what they remove.
_END_TIMEOUT_S = 90.0


class Host(WorkerPlugin):
    """All sessions of a worker process. A plugin, so that it hears when the worker ends."""

    name = NAME

    def __init__(self) -> None:
        self.sessions: dict[str, Session] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: anyio.Event | None = None
        self._group: anyio.abc.TaskGroup | None = None

    def setup(self, worker: Any) -> None:
        """Start the thread."""
        self._worker = worker
        ready = threading.Event()
        self._thread = threading.Thread(
            target=anyio.run, args=(self._serve, ready), name=NAME, daemon=True
        )
        self._thread.start()
        ready.wait()

    async def teardown(self, worker: Any) -> None:
        """Suspend all guests and end the thread."""
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join, _END_TIMEOUT_S)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the loop of the guests; called in dask's."""
        assert self._loop is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def hold(self, session: str, hold: str) -> None:
        """Have a place that dask gave, until it is released; called in a thread of dask's."""

        async def take() -> threading.Event | None:
            found = self.sessions.get(session)
            return None if found is None else found.expect_hold(hold)

        assert self._loop is not None
        ends = asyncio.run_coroutine_threadsafe(take(), self._loop).result()
        if ends is not None:
            ends.wait()

    async def do(self, what: str, session: str, arguments: dict[str, Any]) -> Any:
        """Do what the supervisor asks for, in the loop of the guests."""
        if what == "enter":
            return await self._enter(session, **arguments)
        if what == "keeps":
            return await anyio.to_thread.run_sync(kept, arguments["path"])
        if what == "sees":
            return await anyio.to_thread.run_sync(_holds, arguments["token"], arguments["text"])
        if what == "take_over":
            run = arguments["run"]
            return await self._end([name for name, at in self.sessions.items() if at.run == run])
        if what == "close":
            if session in self.sessions:
                self.sessions[session].forget_all()
            return await self._end([session])
        mine = self.sessions.get(session)
        if what == "renew":
            return None if mine is None else mine.renew(**arguments)
        if mine is None:
            raise V2VError("the worker has given up what it did: it did not hear from us in time")
        match what:
            case "begin":
                await mine.begin(**arguments)
            case "know":
                mine.know(**arguments)
            case "call":
                mine.attempt(arguments["name"]).call(
                    arguments["call"], arguments["step"], *arguments["arguments"]
                )
            case "undo":
                mine.attempt(arguments["name"]).undo(arguments["call"], arguments["step"])
            case "cancel":
                mine.attempt(arguments["name"]).cancel(arguments["call"])
            case "leave":
                mine.attempt(arguments["name"]).leave()
            case "forget":
                return await mine.forget(**arguments)
            case "release":
                mine.release(arguments["hold"])
            case "rates":
                mine.set_rates(arguments["rates"])
            case _:
                raise V2VError(f"the worker does not know what ‘{what}’ is")
        return None

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = anyio.Event()
        async with anyio.create_task_group() as self._group:
            ready.set()
            await self._stop.wait()
            self._group.cancel_scope.cancel()

    async def _enter(
        self,
        session: str,
        *,
        run: str,
        topic: str,
        lease_s: float,
        open_workshop: OpenWorkshop,
    ) -> float:
        """Begin a session; return what its clock says."""
        assert self._group is not None
        mine = Session(run, lease_s, partial(self._send, topic, session, itertools.count(1)))
        await self._group.start(self._live, session, mine, open_workshop)
        return mine.clock()

    async def _live(
        self,
        session: str,
        mine: Session,
        open_workshop: OpenWorkshop,
        *,
        task_status: anyio.abc.TaskStatus[None],
    ) -> None:
        self.sessions[session] = mine
        try:
            await mine.live(open_workshop, task_status=task_status)
        finally:
            del self.sessions[session]

    async def _end(self, names: list[str]) -> int:
        ending = [self.sessions[name] for name in names if name in self.sessions]
        for each in ending:
            each.close()
        for each in ending:
            await each.ended.wait()
        return len(ending)

    def _send(self, topic: str, session: str, numbers: Iterator[int], lines: list[str]) -> None:
        self._worker.log_event(topic, {"session": session, "number": next(numbers), "lines": lines})


def _holds(token: Path, text: str) -> bool:
    try:
        return token.read_text() == text
    except OSError:
        return False


# What the supervisor has dask run here.


async def answer(request: Sealed, dask_worker: Any) -> Sealed:
    """Do what is asked for; the answer is ``(result, error)``."""
    what, session, arguments = request.open()
    host = dask_worker.plugins.get(NAME)
    if host is None:
        if what in ("take_over", "close"):
            return Sealed.of((0, None))
        host = Host()
        await dask_worker.plugin_add(plugin=host, name=NAME, catch_errors=False)
    try:
        result = await host.run(host.do(what, session, arguments))
    except Exception as error:
        return Sealed.of((None, error_to_send(named(error))))
    if what == "close" and not host.sessions:
        await dask_worker.plugin_remove(name=NAME)
    return Sealed.of((result, None))


def hold(session: str, name: str) -> None:
    """Hold a resource of this worker until the supervisor gives it back. A task of dask."""
    # Else each would take one of the worker's threads, of which there may be only one.
    secede()
    host = get_worker().plugins.get(NAME)
    if isinstance(host, Host):
        host.hold(session, name)
