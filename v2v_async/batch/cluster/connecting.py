"""Opens a cluster for a run: dask's client, the workers, and what watches both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from v2v_async.batch.cluster.address import ClusterAddress
from v2v_async.batch.cluster.cluster import Cluster
from v2v_async.batch.cluster.launching import dask_logs, local_cluster
from v2v_async.batch.cluster.remote_guest import RemoteGuest
from v2v_async.batch.cluster.sealed import has_secrets
from v2v_async.batch.cluster.session import OpenWorkshop
from v2v_async.batch.cluster.workers import no_worker
from v2v_async.batch.pool import Order
from v2v_async.errors import DependencyError, UsageError, V2VError, most_telling
from v2v_async.events import Reporter

if TYPE_CHECKING:
    from distributed import Client

LEASE_S = 30.0
"""A worker that does not hear from its supervisor for so long stops what it does for it."""
_CONNECT_TIMEOUT_S = 15.0
_CLOSE_TIMEOUT_S = 120.0
_WATCH_EVERY_S = 0.25
_TLS_HINT = "set distributed.comm.tls.ca-file, .client.cert and .client.key: docs/batch-cluster.md"


class ClusterPool:
    """Guests of a cluster's workers. Implements :class:`v2v_async.batch.pool.Pool`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._has_warned = False

    def capacities(self) -> Mapping[str, int]:
        """See :class:`Pool`."""
        return self._cluster.capacities()

    def set_rates(self, rates: Mapping[str, int]) -> None:
        """See :class:`Pool`."""
        self._cluster.rates.set(rates)

    def work(self, order: Order, reporter: Reporter) -> RemoteGuest:
        """Return the work of one attempt at a guest, to which ``reporter`` is bound."""
        if not self._cluster.address.is_private and has_secrets(order.options):
            self._warn()
        return RemoteGuest(self._cluster, order, reporter)

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._cluster.reporter.warning(
                f"passwords go to {self._cluster.address} as they are: who can read the network "
                "can read them; use TLS (tls://), as docs/batch-cluster.md shows"
            )


@asynccontextmanager
async def open_cluster(
    address: ClusterAddress,
    reporter: Reporter,
    open_workshop: OpenWorkshop,
    *,
    logs: Path,
    conversions: int = 1,
    copies: int = 4,
    lease_s: float = LEASE_S,
) -> AsyncIterator[ClusterPool]:
    """Have a cluster for a run, for the duration of a block.

    ``logs`` is where what dask says goes. ``conversions`` and ``copies`` are of all workers of
    ``local:N`` together.

    Raises:
        DependencyError: dask.distributed is not installed, or the workers lack v2v-async.
        UsageError: the scheduler wants TLS and none is configured.
        V2VError: it can't be reached, has no worker that can take a guest, or has gone; then the
            block is cancelled.
    """
    _import()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        async with AsyncExitStack() as stack:
            stack.enter_context(dask_logs(logs / "dask.log"))
            client = await _client(stack, address, logs, conversions, copies)
            cluster = Cluster(client, address, reporter, open_workshop, lease_s)
            client.subscribe_topic(cluster.topic, cluster.hear)
            client.subscribe_topic("all", cluster.hear_of_workers)
            await cluster.welcome_all()
            if not cluster.workers:
                raise cluster.problem or no_worker(cluster.uri)
            async with anyio.create_task_group() as group:
                group.start_soon(_watch_scheduler, client, cluster)
                group.start_soon(cluster.keep_welcoming)
                group.start_soon(cluster.keep_leases)
                group.start_soon(cluster.rates.keep_telling)
                try:
                    yield ClusterPool(cluster)
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_TIMEOUT_S):
                        await cluster.close()
                    group.cancel_scope.cancel()
                    for topic in (cluster.topic, "all"):
                        client.unsubscribe_topic(topic)
    except BaseExceptionGroup as problems:
        raise most_telling(problems) from None


def _import() -> None:
    try:
        import distributed
    except ImportError as error:
        raise DependencyError(
            f"dask.distributed is not installed: {error}",
            hint="install it: pip install 'v2v-async[cluster]'",
        ) from error
    assert distributed.__name__


async def _client(
    stack: AsyncExitStack, address: ClusterAddress, logs: Path, conversions: int, copies: int
) -> Client:
    from distributed import Client

    where: Any = address.uri
    security = None
    if address.uri is not None and address.uri.startswith("tls:"):
        _check_tls(address)
    if address.workers is not None:
        each = address.workers
        where = await stack.enter_async_context(
            local_cluster(each, -(-conversions // each), -(-copies // each), logs)
        )
        security = where.security
    try:
        client = Client(
            where,
            asynchronous=True,
            set_as_default=False,
            security=security,
            timeout=_CONNECT_TIMEOUT_S,
            name="v2v-async",
        )
        stack.push_async_callback(_close, client)
        await client
    except OSError as error:
        raise V2VError(
            f"the scheduler {address} can't be reached: {error}",
            hint="is ‘dask scheduler’ running there, and the port open? One with TLS is tls://",
        ) from error
    return client


def _check_tls(address: ClusterAddress) -> None:
    """Refuse at once what dask would try for long: TLS for which it has no certificates."""
    import dask
    from distributed.security import Security

    if dask.config.get("distributed.client.security-loader", None) is not None:
        return
    try:
        context = Security().get_connection_args("client").get("ssl_context")
    except OSError as error:
        raise UsageError(
            f"--cluster {address}: what dask's settings say of TLS can't be used: {error}",
            hint=_TLS_HINT,
        ) from error
    if context is None:
        raise UsageError(
            f"--cluster {address}: dask's settings name no certificates", hint=_TLS_HINT
        )


async def _close(client: Client) -> None:
    with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_TIMEOUT_S):
        await client.close(timeout=_CONNECT_TIMEOUT_S)


async def _watch_scheduler(client: Client, cluster: Cluster) -> None:
    """Raise when the scheduler is gone. A new one would know nothing of what was under way."""
    while client.status == "running":
        await anyio.sleep(_WATCH_EVERY_S)
    cluster.lose_all()
    raise V2VError(
        f"the scheduler {cluster.address} went away",
        hint="start it and its workers again, then go on: v2v-async batch resume",
    )
