"""A negotiated connection: a handle together with what its server can do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.to_thread

from v2v_async.extent import STATE_ZERO
from v2v_async.handle import BASE_ALLOCATION, ExportInfo, Handle
from v2v_async.unwaited import run_unwaited

CONNECT_TIMEOUT_S = 30.0
"""A local server answers in milliseconds; a remote one behind nbdkit may log in first."""

_MOST_EXTENTS = 1 << 30
"""Bytes asked about at once: servers take 32 bits."""


@dataclass(frozen=True, slots=True)
class Connection:
    """``handle`` is connected to ``endpoint`` (a socket path or URI); ``info`` was negotiated."""

    endpoint: str
    handle: Handle
    info: ExportInfo


async def open_connection(
    endpoint: str, *, contexts: Sequence[str] = (BASE_ALLOCATION,), timeout_s: float | None = None
) -> Connection:
    """Connect and negotiate, without I/O on the disk. The caller closes ``handle``.

    Raises:
        ConnectError: nobody is there, or negotiation failed.
        TimeoutError: the server did not answer in ``timeout_s`` (default 30 s).
    """
    handle = Handle(contexts)

    def connect() -> ExportInfo:
        handle.connect(endpoint)
        return handle.info()

    try:
        with anyio.fail_after(timeout_s if timeout_s is not None else CONNECT_TIMEOUT_S):
            # A server that accepts and says nothing may hold the thread for ever.
            info = await run_unwaited(connect, "connect")
    except BaseException:
        handle.close(politely=False)  # the error's traceback would keep it, and its socket, open
        raise
    return Connection(endpoint, handle, info)


@asynccontextmanager
async def connected(
    endpoint: str, *, contexts: Sequence[str] = (BASE_ALLOCATION,)
) -> AsyncIterator[Connection]:
    """Have a connection for the duration of a block, and close it politely."""
    connection = await open_connection(endpoint, contexts=contexts)
    try:
        yield connection
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(connection.handle.close)


async def count_data(connection: Connection) -> int:
    """Return how many bytes of an export have data, as far as its server tells.

    Raises:
        NbdError: it can't be asked.
    """
    size, offset, found = connection.info.size, 0, 0
    if not connection.info.has_extents:
        return size
    while offset < size:
        ask = partial(connection.handle.extents_now, min(size - offset, _MOST_EXTENTS), offset)
        told = await anyio.to_thread.run_sync(ask) or [(size - offset, 0)]
        for length, flags in told:
            found += 0 if flags & STATE_ZERO else min(length, size - offset)
            offset += length
    return found


async def export_info(endpoint: str) -> ExportInfo:
    """Connect only to learn what an export is."""
    async with connected(endpoint) as connection:
        return connection.info
