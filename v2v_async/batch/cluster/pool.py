"""``--cluster``: a pool of workers for a batch, each with a local pool of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from v2v_async.batch.cluster.address import ClusterAddress, parse_cluster
from v2v_async.batch.cluster.connecting import ClusterPool, open_cluster
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.pool import OpenPool, local_pool
from v2v_async.batch.record import folder
from v2v_async.batch.schedule.needs import capacities
from v2v_async.events import Reporter
from v2v_async.v2vdir import default_parent

# One buffer of the largest request, in and out.
_LEAST_BYTES_IN_FLIGHT = 64 << 20


def cluster_pool(text: str) -> OpenPool:
    """Return what opens the pool that ``--cluster TEXT`` names.

    Raises:
        UsageError: it names none.
    """
    return partial(_open, parse_cluster(text))


@asynccontextmanager
async def _open(
    address: ClusterAddress, plan: Plan, reporter: Reporter
) -> AsyncIterator[ClusterPool]:
    here = capacities(plan.limits, plan.windows, default_parent())
    async with open_cluster(
        address,
        reporter,
        partial(local_pool, _of_worker(plan, address.workers or 1)),
        logs=folder.state_home() / reporter.run / "cluster",
        conversions=here["conversions"],
        copies=here["disks"],
    ) as pool:
        yield pool


def _of_worker(plan: Plan, workers: int) -> Plan:
    """Return the plan for one of the workers that share a machine's memory."""
    most = max(_LEAST_BYTES_IN_FLIGHT, plan.limits.bytes_in_flight // workers)
    limits = plan.limits.model_copy(update={"bytes_in_flight": most})
    # A worker is told of its guests one by one.
    return plan.model_copy(update={"limits": limits, "guests": []})
