"""A cluster that works on guests: asks its workers, hears what they say, notices when one is gone.

Made by :func:`v2v_async.batch.cluster.connecting.open_cluster`. All of it runs in the supervisor's
event loop, and so does dask's client.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from v2v_async.batch.cluster.address import ClusterAddress
from v2v_async.batch.cluster.answers import Answer, either
from v2v_async.batch.cluster.errors_sent import error_sent
from v2v_async.batch.cluster.placement import CONVERSIONS, COPIES, Load, choose
from v2v_async.batch.cluster.rates import Rates
from v2v_async.batch.cluster.sealed import Sealed
from v2v_async.batch.cluster.session import OpenWorkshop
from v2v_async.batch.cluster.workers import (
    Introduction,
    Worker,
    check_introductions,
    introducing,
    no_worker,
)
from v2v_async.batch.retry import is_permanent
from v2v_async.errors import V2VError, most_telling
from v2v_async.events import Event, Reporter

if TYPE_CHECKING:
    from distributed import Client

ASK_TIMEOUT_S = 60.0
"""An answer is sent at once, but for a new attempt: that first ends what an earlier one left."""
# A worker that was killed is started again by its nanny in some seconds, by a person in some more.
_NO_WORKER_S = 60.0


class Cluster:
    """Workers that guests are handed to. ``session`` names this supervisor among others."""

    def __init__(
        self,
        client: Client,
        address: ClusterAddress,
        reporter: Reporter,
        open_workshop: OpenWorkshop,
        lease_s: float,
    ) -> None:
        self.session = uuid.uuid4().hex
        self.run = reporter.run
        self.address = address
        self.reporter = reporter
        self._client = client
        self._open_workshop = open_workshop
        self._tokens: dict[Path, Path] = {}
        self._lease_s = lease_s
        self._workers: dict[str, Worker] = {}
        self._listeners: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._changed = anyio.Event()
        self.rates = Rates(self._send_rates)
        self.is_lost = False
        self.problem: V2VError | None = None

    @property
    def topic(self) -> str:
        """Where the workers of this run say what they have to say."""
        return f"v2v-async-{self.session}"

    @property
    def uri(self) -> str:
        """The scheduler's address."""
        scheduler: Any = self._client.scheduler
        return str(scheduler.address)

    @property
    def workers(self) -> list[Worker]:
        """Return the workers that are there and can take guests."""
        return [each for each in self._workers.values() if each.load.is_suitable]

    def capacities(self) -> dict[str, int]:
        """Return what all workers together have: ``conversions``, ``disks``, ``memory`` (bytes)."""
        machines = {
            each.introduction.machine: each.introduction.memory for each in self._workers.values()
        }
        return {
            "conversions": sum(each.load.total[CONVERSIONS] for each in self.workers),
            "disks": sum(each.load.total[COPIES] for each in self.workers),
            "memory": sum(machines.values()),
        }

    # Workers that come and go.

    async def welcome(self, addresses: Collection[str] | None = None) -> None:
        """Take workers in: those of ``addresses``, or all that there are.

        Raises:
            V2VError: one of them has another v2v-async, or can't do our work at all.
        """
        wanted = None if addresses is None else list(addresses)
        found = await self._client.run(introducing(), workers=wanted, on_error="return")
        introductions = check_introductions(found, self.uri)
        try:
            async with anyio.create_task_group() as group:
                for address, introduction in introductions.items():
                    if address not in self._workers:
                        group.start_soon(self._enter, address, introduction)
        except BaseExceptionGroup as problems:
            raise most_telling(problems) from None
        self._change()

    async def _enter(self, address: str, introduction: Introduction) -> None:
        worker = Worker(introduction, Load(address, introduction.resources))
        try:
            await self._begin_session(worker)
        except V2VError as error:
            error.message = f"the worker {worker.label} can't take part: {error.message}"
            if is_permanent(error):
                raise
            self.problem = error
            self.reporter.warning(error.message)

    async def _begin_session(self, worker: Worker) -> None:
        # A supervisor of this run that was killed may not be missed by the workers yet.
        await self.ask(worker, "take_over", run=self.run)
        if not worker.load.is_suitable:
            return
        await self.ask(
            worker,
            "enter",
            run=self.run,
            topic=self.topic,
            lease_s=self._lease_s,
            open_workshop=self._open_workshop,
        )
        worker.heard = time.monotonic()
        self._workers[worker.address] = worker
        self.rates.add(worker.address)

    def lose(self, address: str) -> None:
        """Note that a worker is gone, with all that it did."""
        worker = self._workers.pop(address, None)
        if worker is not None:
            worker.lost.set()
            self.rates.remove(address)
            self._change()
            self.reporter.warning(f"the worker {worker.label} is gone")

    def lose_all(self) -> None:
        """Note that the scheduler is gone, and with it every way to a worker."""
        self.is_lost = True
        for address in list(self._workers):
            self._workers.pop(address).lost.set()
        self._change()

    async def keep_leases(self) -> None:
        """Tell the workers that we are there, until cancelled; who does not answer is lost."""
        while True:
            await anyio.sleep(self._lease_s / 4)
            async with anyio.create_task_group() as group:
                for worker in list(self._workers.values()):
                    group.start_soon(self._renew, worker)

    async def _renew(self, worker: Worker) -> None:
        try:
            has_us = await self.ask(worker, "renew", timeout_s=self._lease_s / 4)
        except V2VError:
            # By then it has noticed too that it is not heard, and stopped.
            if time.monotonic() > worker.heard + 1.5 * self._lease_s:
                self.lose(worker.address)
            return
        worker.heard = time.monotonic()
        if not has_us:
            # We were away for too long, as a laptop that slept.
            self.lose(worker.address)
            await self.welcome([worker.address])

    async def close(self) -> None:
        """Have all workers end what they do for this run."""
        for token in self._tokens.values():
            token.unlink(missing_ok=True)
        async with anyio.create_task_group() as group:
            for worker in list(self._workers.values()):
                group.start_soon(self._close, worker)

    async def _close(self, worker: Worker) -> None:
        try:
            await self.ask(worker, "close")
        except V2VError as error:
            self.reporter.warning(f"the worker {worker.label} may go on for a while: {error}")

    # What is said between us.

    async def ask(
        self, worker: Worker, what: str, *, timeout_s: float = ASK_TIMEOUT_S, **arguments: Any
    ) -> Any:
        """Ask a worker for something and return its answer.

        Raises:
            V2VError: its error, or that it is gone or does not answer.
        """
        from v2v_async.batch.cluster.host import answer

        request = Sealed.of((what, self.session, arguments))
        answers: list[Sealed] = []
        problems: list[str] = []

        async def send(scope: anyio.CancelScope) -> None:
            try:
                found = await self._client.run(answer, request, workers=[worker.address])
                answers.append(found[worker.address])
            except Exception as error:  # whatever dask's comms raise when one side goes away
                problems.append(f"{type(error).__name__}: {error}")
            scope.cancel()

        async def lose(scope: anyio.CancelScope) -> None:
            await worker.lost.wait()
            scope.cancel()

        with anyio.move_on_after(timeout_s):
            async with anyio.create_task_group() as race:
                race.start_soon(send, race.cancel_scope)
                race.start_soon(lose, race.cancel_scope)
        if answers:
            result, error = answers[0].open()
            if error is not None:
                raise error_sent(error)
            return result
        if worker.lost.is_set() or self.is_lost:
            raise worker.gone()
        raise V2VError(
            f"the worker {worker.label} does not answer"
            + (f" ({problems[0]})" if problems else f" within {timeout_s:.0f} s"),
            hint="is it up, and the way to it from the scheduler open?",
        )

    @contextmanager
    def listening(self, name: str, to: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """Have what workers say under a name handed on, for the duration of a block."""
        self._listeners[name] = to
        try:
            yield
        finally:
            del self._listeners[name]

    def hear(self, event: tuple[float, Any]) -> None:
        """Take what a worker has sent: events, and answers behind the events before them."""
        _, message = event
        worker = self._workers.get(message["worker"])
        if worker is not None:
            worker.number += 1
            if message["number"] != worker.number:
                # Never seen. What it says can't be relied on any more.
                self.reporter.warning(f"something that the worker {worker.label} said is missing")
                self.lose(worker.address)
        for line in message["lines"]:
            if not line.startswith('{"answer"'):
                self.reporter.pass_on(Event.from_json(line))
                continue
            told = json.loads(line)
            listener = self._listeners.get(f"{told['answer']} {told['of']}")
            if listener is not None:
                listener(told)

    async def _send_rates(self, address: str, rates: Mapping[str, int]) -> bool:
        worker = self._workers.get(address)
        if worker is None:
            return False
        try:
            await self.ask(worker, "rates", rates=rates)
        except V2VError as error:
            self.reporter.debug(f"no new rates for the worker {worker.label}: {error}")
            return False
        return True

    # Places.

    async def shares(self, worker: Worker, path: Path) -> bool:
        """Tell whether a worker has the same directory as we have where ``path`` is, or will be."""
        directory = path.parent
        while not directory.is_dir():
            directory = directory.parent
        if directory not in worker.sees:
            token = self._tokens.get(directory)
            if token is None:
                token = self._tokens[directory] = directory / f".v2v-async-{self.session}"
                with suppress(OSError):  # where we can't write, nobody finds it
                    token.write_text(self.session)
            worker.sees[directory] = await self.ask(worker, "sees", token=token)
        return worker.sees[directory]

    @asynccontextmanager
    async def placed(self, guest: str) -> AsyncIterator[Worker]:
        """Have a worker that holds a place for a guest's conversion.

        Raises:
            V2VError: there is none, and none has come.
        """
        worker = await self.worker_for(CONVERSIONS, None)
        async with self.holding(worker, CONVERSIONS, guest, is_counted=True):
            yield worker

    async def worker_for(self, resource: str | None, among: Collection[str] | None) -> Worker:
        """Return the best worker for a guest, of ``among`` or of all; it is counted as taken.

        Raises:
            V2VError: there is none, and none has come.
        """
        end = time.monotonic() + _NO_WORKER_S
        while True:
            changed = self._changed
            able = {each.address for each in self.workers}
            if among is not None:
                able &= set(among)
            address = choose([each.load for each in self._workers.values()], resource, able)
            if address is not None:
                worker = self._workers[address]
                if resource is not None:
                    worker.load.taken[resource] += 1
                return worker
            if able:  # they are busy
                end = time.monotonic() + _NO_WORKER_S
            if self.is_lost or time.monotonic() > end:
                raise no_worker(self.uri)
            with anyio.move_on_after(_NO_WORKER_S / 4):
                await changed.wait()

    @asynccontextmanager
    async def holding(
        self, worker: Worker, resource: str, guest: str, *, is_counted: bool = False
    ) -> AsyncIterator[None]:
        """Hold one of a worker's resource, for which dask makes others wait."""
        from v2v_async.batch.cluster.host import hold

        name = f"v2v-async-{resource}-{guest}-{uuid.uuid4().hex[:8]}"
        if not is_counted:
            worker.load.taken[resource] += 1
        held = Answer()
        try:
            with self.listening(f"held {name}", held):
                future = self._client.submit(
                    hold,
                    self.session,
                    name,
                    key=name,
                    workers=[worker.address],
                    allow_other_workers=False,
                    resources={resource: 1},
                    retries=0,
                    pure=False,
                )
                try:
                    await either(held.come, worker.lost)
                    if worker.lost.is_set():
                        raise worker.gone()
                    yield
                finally:
                    with anyio.CancelScope(shield=True):
                        if not worker.lost.is_set():
                            await self._release(worker, name)
                        future.release()
        finally:
            worker.load.taken[resource] -= 1
            self._change()

    async def _release(self, worker: Worker, name: str) -> None:
        try:
            await self.ask(worker, "release", hold=name)
        except V2VError as error:
            self.reporter.debug(f"a place of the worker {worker.label} is not given back: {error}")

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
