"""Workers on this machine: ``--cluster local:N``.

They are processes of dask's nannies, which start one again when it dies; they end with us, however
we end. What they and dask say goes to files. The scheduler listens on the loopback interface, where
every user of the machine could have it run programs as us: so it takes only those who show a
certificate that is made for this run and kept in memory.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from v2v_async.batch.cluster.placement import CONVERSIONS, COPIES
from v2v_async.errors import DependencyError, V2VError

if TYPE_CHECKING:
    from distributed import LocalCluster

_START_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 60.0
_QUIET = {
    # dask's HTTP servers can't be left out, but what they would show to every user can.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    # Until a worker's output goes to its file, it has our terminal.
    "distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "warning",
}
PRELOAD = "v2v_async.batch.cluster.local_worker"
LOG_VARIABLE = "V2V_ASYNC_WORKER_LOGS"


@asynccontextmanager
async def local_cluster(
    workers: int, conversions: int, copies: int, logs: Path
) -> AsyncIterator[LocalCluster]:
    """Have workers here; each takes ``conversions`` and ``copies`` at once.

    Raises:
        DependencyError: ``cryptography`` is not installed.
        V2VError: they don't start.
    """
    from distributed import LocalCluster
    from distributed.security import Security

    try:
        security = Security.temporary()
    except ImportError as error:
        raise DependencyError(
            "cryptography is not installed, and other users of this machine could use the workers",
            hint="install it: pip install 'v2v-async[cluster]'",
        ) from error
    import dask

    with (
        _scratch(logs / "scratch") as directory,
        dask.config.set({**_QUIET, "temporary-directory": str(directory)}),
        _same_environment(),
    ):
        # It is awaitable where it is asynchronous, which its type does not say.
        cluster: Any = LocalCluster(
            n_workers=workers,
            # Work is done in the thread of the guests; these only wait.
            threads_per_worker=1,
            processes=True,
            asynchronous=True,
            host="127.0.0.1",
            protocol="tls://",
            security=security,
            dashboard_address=None,
            silence_logs=False,
            scheduler_kwargs={"allowed_failures": 0, "dashboard_address": "127.0.0.1:0"},
            resources={CONVERSIONS: conversions, COPIES: copies},
            # dask would divide the machine's memory; what a copy takes is bounded by its engine.
            memory_limit=0,
            preload=[PRELOAD],
            env={LOG_VARIABLE: str(logs)},
        )
        try:
            try:
                with anyio.fail_after(_START_TIMEOUT_S):
                    await cluster
            except (OSError, RuntimeError, TimeoutError) as error:
                raise V2VError(
                    f"the workers of --cluster local:{workers} do not start: {error}",
                    hint=f"see the logs in ‘{logs}’",
                ) from error
            yield cluster
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_TIMEOUT_S):
                await cluster.close(timeout=_CLOSE_TIMEOUT_S / 2)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Have a directory for dask; one that a killed supervisor has left is removed first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what dask's nannies do to our environment when they start a worker."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def dask_logs(path: Path) -> Iterator[None]:
    """Have what dask says written to a file, and not to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    found = [logging.getLogger(name) for name in ("distributed", "tornado", "asyncio")]
    found += [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.startswith(("distributed.", "tornado."))
    ]
    before = [(each, each.handlers, each.propagate) for each in found]
    for each in found:
        # dask gives some of its loggers handlers of their own.
        each.handlers = [] if "." in each.name else [handler]
        each.propagate = "." in each.name
    try:
        yield
    finally:
        for each, handlers, propagate in before:
            each.handlers, each.propagate = handlers, propagate
        handler.close()
