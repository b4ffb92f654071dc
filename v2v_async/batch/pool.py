"""Where the guests of a batch are worked on: in this process, or in those of a cluster.

::

    Runner ── GuestWork ──> Pool ──┬─ local: SupervisedGuest, one copy engine for all
                                   └─ cluster/: the same, in worker processes
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from v2v_async.batch.guest_work import Copying, SupervisedGuest
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.runner import GuestWork
from v2v_async.copy.engine import Engine, EngineLimits, copy_engine
from v2v_async.events import Reporter
from v2v_async.options import GuestOptions


@dataclass(frozen=True, slots=True)
class Order:
    """One guest to be worked on: its options, its v2v directory, its logs, how it is copied."""

    options: GuestOptions
    path: Path
    logs: Path
    copying: Copying


class Pool(Protocol):
    """Makes the work of guests."""

    def work(self, order: Order, reporter: Reporter) -> GuestWork:
        """Return the work of one attempt at a guest; ``reporter`` is bound to it."""
        ...

    def capacities(self) -> Mapping[str, int]:
        """Return what there is of ``conversions``, ``disks``, ``memory`` where it is not here."""
        ...

    def set_rates(self, rates: Mapping[str, int]) -> None:
        """Set bytes a second, by place (``hosts.esx1``), ``""`` for all; others are unlimited."""
        ...


OpenPool = Callable[[Plan, Reporter], AbstractAsyncContextManager[Pool]]


class LocalPool:
    """Guests of this process, whose copies share one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def work(self, order: Order, reporter: Reporter) -> GuestWork:
        """See :class:`Pool`."""
        return SupervisedGuest(
            order.options, order.path, order.logs, self._engine, order.copying, reporter
        )

    def capacities(self) -> Mapping[str, int]:
        """See :class:`Pool`."""
        return {}

    def set_rates(self, rates: Mapping[str, int]) -> None:
        """See :class:`Pool`."""
        self._engine.set_rates(rates)


@asynccontextmanager
async def local_pool(plan: Plan, reporter: Reporter) -> AsyncIterator[LocalPool]:
    """Have a pool in this process, with the plan's limits."""
    limits = EngineLimits(
        bytes_in_flight=plan.limits.bytes_in_flight, max_connections=plan.limits.connections
    )
    async with copy_engine(limits) as engine:
        yield LocalPool(engine)
