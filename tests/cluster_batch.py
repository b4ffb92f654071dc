"""A batch of made-up guests that a Runner hands to a cluster.

``python -m tests.cluster_batch HOME CLUSTER LEASE`` runs one that a test may kill: of the guests
``a`` and ``b``, which wait in their first copy.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from tests.cluster_work import made_order, made_workshop
from tests.waiting import until
from v2v_async.batch.cluster.address import parse_cluster
from v2v_async.batch.cluster.connecting import ClusterPool, open_cluster
from v2v_async.batch.plan.model import GuestPlan, Retries
from v2v_async.batch.pool import Order
from v2v_async.batch.record.journal import GuestRecord, open_journal
from v2v_async.batch.runner import GuestWork, Runner
from v2v_async.batch.schedule.needs import Needs
from v2v_async.batch.schedule.scheduler import Scheduler
from v2v_async.events import Event, Reporter


class Batch:
    """Guests of two disks each that a Runner hands to a cluster."""

    def __init__(self, home: Path, cluster: str = "local:2") -> None:
        self.home = home
        self.address = parse_cluster(cluster)
        for name in ("work", "logs"):
            (home / name).mkdir(exist_ok=True)
        self.events: list[Event] = []
        self.orders: dict[str, Order] = {}
        self.records: dict[str, GuestRecord] = {}
        self.runner: Runner | None = None

    def guest(self, name: str, **wishes: Any) -> None:
        """Add one."""
        self.orders[name] = made_order(self.home, name, **wishes)

    @asynccontextmanager
    async def opened(self, **options: Any) -> AsyncIterator[ClusterPool]:
        given = {"conversions": 2, "copies": 4, **options}
        async with open_cluster(
            self.address,
            Reporter(self.events.append, "r"),
            partial(made_workshop, self.home),
            logs=self.home / "dask",
            **given,
        ) as cluster:
            yield cluster

    async def run(self, cluster: ClusterPool, **retries: Any) -> None:
        """Run all to their end, or go on with what an earlier run did."""
        path = self.home / "journal.db"
        with open_journal(path, create=not path.exists()) as journal:
            journal.add_guests(self.orders)
            self.runner = Runner(
                [GuestPlan(name=name) for name in self.orders],
                {
                    name: Needs(
                        rank=(float(place),),
                        convert={"conversions": 1},
                        keeps={},
                        disks={1: {"disks": 1}, 2: {"disks": 1}},
                        lengths_s={},
                    )
                    for place, name in enumerate(self.orders)
                },
                Scheduler({"conversions": 2, "disks": 4}),
                journal,
                Reporter(self.events.append, "r"),
                self._work_on(cluster),
                Retries(**{"delay": 0.05, **retries}),
            )
            self.records = {each.name: each for each in await self.runner.run()}

    def _work_on(self, cluster: ClusterPool) -> Callable[[GuestPlan, int], GuestWork]:
        reporter = Reporter(self.events.append, "r")
        return lambda plan, attempt: cluster.work(
            self.orders[plan.name], reporter.for_guest(plan.name)
        )

    @property
    def phases(self) -> dict[str, str]:
        for name, each in self.records.items():
            print(name, each.phase, each.failure)  # pytest shows it where a test fails
        return {name: each.phase for name, each in self.records.items()}

    def calls(self, guest: str | None = None) -> list[tuple[str, str, int]]:
        """Return what was done, in order: guest, step, pid."""
        try:
            lines = (self.home / "calls").read_text().splitlines()
        except OSError:
            return []
        found = [tuple(json.loads(line)[:3]) for line in lines]
        return [(who, what, pid) for who, what, pid in found if guest in (None, who)]

    def steps(self, guest: str) -> list[str]:
        return [what for _, what, _ in self.calls(guest)]

    async def reached(
        self,
        guest: str,
        step: str,
        times: int = 1,
        *,
        of: subprocess.Popen[bytes] | None = None,
    ) -> int:
        """Wait until a worker is at a step, for a supervisor that is another process; its pid."""

        def pids() -> list[int]:
            return [pid for _, what, pid in self.calls(guest) if what == step]

        await until(
            lambda: len(pids()) >= times,
            lambda: f"{guest} is at {step} ({times}): {self.steps(guest)}",
            of=of,
        )
        return pids()[times - 1]

    def let_go(self, guest: str) -> None:
        (self.home / f"{guest}.go").touch()

    def texts(self, type_: str) -> list[str]:
        return [each.text or "" for each in self.events if each.type == type_]


def assert_in_order(events: list[Event], guest: str) -> None:
    """Each step that begins ends before the next does, but for copies of several disks at once."""
    told = [each for each in events if each.guest == guest and each.step is not None]
    at_work: dict[str, float] = {}
    for each in told:
        assert each.step is not None
        if each.type == "started":
            assert each.step not in at_work
            at_work[each.step] = each.time
        elif each.type in ("finished", "failed", "cancelled") and each.disk is None:
            assert each.time >= at_work.pop(each.step)
    assert not at_work, f"{guest}: begun and not ended: {at_work}"
    for disk in (1, 2):
        types = [each.type for each in told if each.disk == disk and each.type != "debug"]
        assert types[0] == "planned"
        assert types[-1] == "finished"
        amounts = [each.bytes.copied for each in told if each.disk == disk and each.bytes]
        assert amounts == sorted(amounts)


async def _main(home: Path, cluster: str, lease_s: float) -> None:
    batch = Batch(home, cluster)
    for name in ("a", "b"):
        batch.guest(name, wait="copy1")
    async with batch.opened(lease_s=lease_s) as opened:
        await batch.run(opened)


if __name__ == "__main__":
    anyio.run(_main, Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
