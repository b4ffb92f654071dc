"""Made-up work for the workers of a cluster: guests that say where they are and wait for files.

It is imported by worker processes. A guest's work leaves files in its v2v directory as real work
does, and has a real program running while its servers run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from v2v_async import process
from v2v_async.batch.guest_work import Copying
from v2v_async.batch.pool import Order
from v2v_async.errors import (
    ConversionError,
    NotKeptError,
    ServerExitedError,
    V2VError,
    most_telling,
)
from v2v_async.events import Bytes, Reporter
from v2v_async.options import ConvertOptions, GuestOptions, InputOptions, OutputOptions
from v2v_async.secret import Secret


def made_order(home: Path, guest: str, *, password: str | None = None, **wishes: str) -> Order:
    """Return an order; a guest may ``wait`` or ``fail`` in a step, and a disk be a ``flood``.

    It may ``lose`` what was converted, once, and ``wait`` when it is ``finalized`` already.
    """
    options = GuestOptions(
        input=InputOptions(
            mode="disk",
            arguments=(guest,),
            options=tuple(wishes.items()),
            password=None if password is None else Secret(password),
        ),
        convert=ConvertOptions(),
        output=OutputOptions(mode="null"),
    )
    return Order(options, home / "work" / guest, home / "logs" / guest, Copying({}))


class MadeWork:
    """Notes each step in ``HOME/calls``: guest, step, pid of the worker."""

    def __init__(self, order: Order, reporter: Reporter, shop: MadeWorkshop) -> None:
        self._order = order
        self._reporter = reporter
        self._shop = shop
        self._path = order.path
        self._guest = order.options.input.arguments[0]
        self._wishes = dict(order.options.input.options)
        self._server: process.Child | None = None

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[None]:
        self._path.mkdir(mode=0o700, exist_ok=True)
        self._order.logs.mkdir(parents=True, exist_ok=True)
        held = self._path / "held"
        held.touch()
        self._server = await process.start(["tail", "-f", str(held)])
        self._note("servers")
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch)
                yield
                group.cancel_scope.cancel()
        except BaseExceptionGroup as problems:
            raise most_telling(problems) from None
        finally:
            with anyio.CancelScope(shield=True):
                await process.end(self._server)
            self._note("no servers")

    async def _watch(self) -> None:
        assert self._server is not None
        status = await self._server.wait()
        raise ServerExitedError("the server in1 went away", status=status, stderr_tail="killed")

    async def convert(self) -> None:
        if (self._path / "state.json").exists():
            self._note("found state")
        await self._step("convert")
        (self._path / "state.json").write_text(json.dumps({"made_by": self._guest}))
        (self._path / "metadata.out").touch()

    async def reopen(self) -> bool:
        await self._step("reopen")
        if self._wishes.get("lose") and not (self._shop.home / f"{self._guest}.lost").exists():
            (self._shop.home / f"{self._guest}.lost").touch()
            raise NotKeptError("what was converted is not there any more")
        return True

    async def prepare(self) -> None:
        await self._step("prepare")

    async def copy(self, disk: int) -> None:
        mine = self._reporter.for_step("copy").for_disk(disk)
        mine.emit("planned", bytes=Bytes(total=1000, data=1000))
        count = int(self._wishes.get(f"flood{disk}") or 3)
        for number in range(count):
            mine.emit("progress", bytes=Bytes(total=1000, copied=number))
            mine.debug(f"line {number}")
        await self._step(f"copy{disk}")
        mine.emit("finished", bytes=Bytes(total=1000, copied=1000))

    async def finalize(self) -> list[str]:
        await self._step("finalize")
        password = self._order.options.input.password
        if password is not None:
            told = hashlib.sha256(password.reveal().encode()).hexdigest()
            (self._shop.home / f"{self._guest}.digest").write_text(told)
        if self._wishes.get("wait") == "finalized":
            (self._path / "finalized").touch()
            await self._step("finalized")
        return [f"made of {self._guest}"]

    async def abandon(self) -> bool:
        self._note("abandon")
        return (self._path / "finalized").exists()

    async def suspend(self) -> None:
        self._note("suspend")

    async def _step(self, step: str) -> None:
        mine = self._reporter.for_step(step)
        mine.emit("started")
        self._note(step)
        (self._order.logs / f"{step}.log").write_text(f"log of {step}\n")
        if self._wishes.get("wait") == step:
            gate = self._shop.home / f"{self._guest}.go"
            while not gate.exists():
                await anyio.sleep(0.02)  # the test is another process, and may let it wait for ever
        if self._wishes.get("fail") == step:
            raise ConversionError("no operating system", step=step, hint="there is none")
        mine.emit("finished")

    def _note(self, what: str) -> None:
        line = json.dumps([self._guest, what, os.getpid(), time.time()]) + "\n"
        with (self._shop.home / "calls").open("a") as file:
            file.write(line)


class MadeWorkshop:
    """Makes such work; notes the rates that it is told."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def work(self, order: Order, reporter: Reporter) -> MadeWork:
        return MadeWork(order, reporter, self)

    def capacities(self) -> Mapping[str, int]:
        return {}

    def set_rates(self, rates: Mapping[str, int]) -> None:
        with (self.home / "rates").open("a") as file:
            file.write(json.dumps([os.getpid(), rates]) + "\n")


@asynccontextmanager
async def made_workshop(home: Path, reporter: Reporter) -> AsyncIterator[MadeWorkshop]:
    """Open one."""
    yield MadeWorkshop(home)


@asynccontextmanager
async def broken_workshop(reporter: Reporter) -> AsyncIterator[MadeWorkshop]:
    """Say that something is missing."""
    if reporter.run:
        raise V2VError("libnbd is not installed here", hint="install it")
    yield MadeWorkshop(Path())
