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
from v2v_async.batch.cluster.asking import ASK_TIMEOUT_S, NotAnsweredError, ask
from v2v_async.batch.cluster.placement import CONVERSIONS, COPIES, Load, choose
from v2v_async.batch.cluster.rates import Rates
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

# A worker that was killed is started again by its nanny in some seconds, by a person in some more.
_NO_WORKER_S = 60.0


class Cluster:
    """Workers that guests are handed to. ``name`` tells this supervisor from others.

    A worker that the scheduler has and that is not among ours is awaited, until it answers: it
    may come late, and be out of reach for a while.
    """

    def __init__(
        self,
        client: Client,
        address: ClusterAddress,
        reporter: Reporter,
        open_workshop: OpenWorkshop,
        lease_s: float,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.run = reporter.run
        self.address = address
        self.reporter = reporter
        self._client = client
        self._open_workshop = open_workshop
        self._tokens: dict[Path, Path] = {}
        self._lease_s = lease_s
        self._workers: dict[str, Worker] = {}
        self._sessions: dict[str, Worker] = {}
        self._awaited: set[str] = set()
        self._is_awaiting = anyio.Event()
        self._is_closing = False
        self._listeners: dict[str, Callable[[dict[str, Any]], None]] = {}
        self._changed = anyio.Event()
        self.rates = Rates(self._send_rates)
        self.is_lost = False
        self.problem: V2VError | None = None

    @property
    def topic(self) -> str:
        """Where the workers of this run say what they have to say."""
        return f"v2v-async-{self.name}"

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

    async def welcome_all(self) -> None:
        """Take in all workers that there are.

        Raises:
            V2VError: one of them has another v2v-async, or can't do our work at all.
        """
        await self.welcome(list(await self._client.nthreads()))

    async def welcome(self, addresses: Collection[str]) -> None:
        """Take workers in; those that do not answer are awaited from then on.

        Raises:
            V2VError: one of them has another v2v-async, or can't do our work at all.
        """
        self._awaited.update(addresses)
        found: dict[str, Any] = {}

        async def introduce(address: str) -> None:
            with anyio.move_on_after(ASK_TIMEOUT_S):
                found.update(
                    await self._client.run(introducing(), workers=[address], on_error="return")
                )

        try:
            async with anyio.create_task_group() as group:
                for address in addresses:
                    group.start_soon(introduce, address)
            introductions = check_introductions(found, self.uri)
            async with anyio.create_task_group() as group:
                for address, introduction in introductions.items():
                    group.start_soon(self._enter, address, introduction)
        except BaseExceptionGroup as problems:
            raise most_telling(problems) from None
        for address in set(addresses) - introductions.keys():
            self.problem = NotAnsweredError(f"the worker {address} does not answer")
        self._change()

    async def _enter(self, address: str, introduction: Introduction) -> None:
        worker = Worker(introduction, Load(address, introduction.resources))
        # What it says from its first moment on is counted.
        self._sessions[worker.session] = worker
        try:
            await self._begin_session(worker)
        except NotAnsweredError as error:
            self.problem = error
        except V2VError as error:
            if worker.lost.is_set():
                return  # it went away, and may be awaited again by now
            self._awaited.discard(address)
            error.message = f"the worker {worker.label} can't take part: {error.message}"
            if is_permanent(error):
                raise
            self.problem = error
            self.reporter.warning(error.message)
        finally:
            if self._workers.get(address) is not worker:
                self._sessions.pop(worker.session, None)

    async def _begin_session(self, worker: Worker) -> None:
        # A supervisor of this run that was killed may not be missed by the worker yet, nor may we
        # be, when it is us who did not hear of it.
        await self.ask(worker, "take_over", run=self.run)
        if worker.load.is_suitable:
            worker.confirmed = await self.ask(
                worker,
                "enter",
                run=self.run,
                topic=self.topic,
                lease_s=self._lease_s,
                open_workshop=self._open_workshop,
            )
        if worker.lost.is_set():
            return
        self._awaited.discard(worker.address)
        if worker.load.is_suitable:
            worker.heard = time.monotonic()
            self._workers[worker.address] = worker
            self.rates.add(worker.address)

    async def keep_welcoming(self) -> None:
        """Take in the workers that come, and those that answer again, until cancelled."""
        begun: set[str] = set()

        async def take_in(address: str) -> None:
            is_told = False
            while address in self._awaited:
                try:
                    await self.welcome([address])
                except V2VError as error:
                    self._awaited.discard(address)
                    self.reporter.warning(error.message)
                if address in self._awaited:
                    if not is_told:
                        is_told = True
                        self.reporter.warning(
                            f"the worker {address} does not answer: it takes guests when it does"
                        )
                    await anyio.sleep(self._lease_s / 4)
            begun.discard(address)

        async with anyio.create_task_group() as group:
            while True:
                self._is_awaiting = anyio.Event()
                for address in self._awaited - begun:
                    begun.add(address)
                    group.start_soon(take_in, address)
                await self._is_awaiting.wait()

    def hear_of_workers(self, event: tuple[float, Any]) -> None:
        """Take what the scheduler says to everybody: who has come, who is gone."""
        _, message = event
        if not isinstance(message, dict):
            return
        if message.get("action") == "add-worker":
            self._await(message["worker"])
        elif message.get("action") == "remove-worker":
            self._awaited.discard(message["worker"])
            for worker in list(self._sessions.values()):
                if worker.address == message["worker"]:
                    self._lose(worker, "is gone")

    def _await(self, address: str) -> None:
        if not self._is_closing:
            self._awaited.add(address)
            self._is_awaiting.set()

    def _lose(self, worker: Worker, why: str) -> None:
        """Note that a worker is gone, with all that it did in this session."""
        self._sessions.pop(worker.session, None)
        worker.lost.set()
        if self._workers.get(worker.address) is worker:
            del self._workers[worker.address]
            self.rates.remove(worker.address)
            self._change()
            self.reporter.warning(f"the worker {worker.label} {why}")

    def lose_all(self) -> None:
        """Note that the scheduler is gone, and with it every way to a worker."""
        self.is_lost = True
        for worker in self._sessions.values():
            worker.lost.set()
        for known in (self._sessions, self._workers, self._awaited):
            known.clear()
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
            confirmed: float | None = await self.ask(
                worker, "renew", timeout_s=self._lease_s / 4, confirmed=worker.confirmed
            )
        except V2VError:
            # By then it has noticed too that it is not heard, and stopped.
            if time.monotonic() > worker.heard + 1.5 * self._lease_s:
                self._lose_for_now(worker, "does not answer")
            return
        if confirmed is None:
            # We were away for too long, as a laptop that slept, or it was.
            self._lose_for_now(worker, "has stopped what it did: it did not hear from us in time")
            return
        worker.confirmed = confirmed
        worker.heard = time.monotonic()

    def _lose_for_now(self, worker: Worker, why: str) -> None:
        """Lose a worker that may only have been out of reach: it is taken in again."""
        if not self._is_closing and worker.session in self._sessions:
            self._lose(worker, why)
            self._await(worker.address)

    async def close(self) -> None:
        """Have all workers end what they do for this run."""
        self._is_closing = True
        self._awaited.clear()
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
        return await ask(self._client, worker, what, timeout_s=timeout_s, **arguments)

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
        worker = self._sessions.get(message["session"])
        if worker is not None:
            worker.number += 1
            if message["number"] != worker.number:
                # Never seen. What it says can't be relied on any more.
                self._lose_for_now(worker, "has said something that did not arrive")
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
                token = self._tokens[directory] = directory / f".v2v-async-{self.name}"
                with suppress(OSError):  # where we can't write, nobody finds it
                    token.write_text(self.name)
            worker.sees[directory] = await self.ask(worker, "sees", token=token, text=self.name)
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
                    worker.session,
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
