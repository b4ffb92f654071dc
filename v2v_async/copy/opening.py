"""Opens both sides of a disk, and more pairs of connections for more lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import anyio
import anyio.to_thread

from v2v_async.connection import open_connection
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.ends import DiskEnd
from v2v_async.copy.file import FileEnd
from v2v_async.copy.null import NullEnd, null_info
from v2v_async.copy.open_file import open_source as open_source_file
from v2v_async.copy.open_file import open_target as open_target_file
from v2v_async.copy.worker import DRAIN_S
from v2v_async.errors import CopyError
from v2v_async.handle import BASE_ALLOCATION, ExportInfo, Handle


@dataclass(frozen=True, slots=True)
class Opened:
    """An open side. ``is_zero``: it was made just now and reads as zeroes."""

    endpoint: Endpoint
    end: DiskEnd
    info: ExportInfo
    is_zero: bool = False


@dataclass(slots=True, eq=False)
class Pair:
    """Both sides of a lane; ``epoch`` is the disk's when the target was connected.

    ``number`` counts the pairs of a disk in the order in which they were opened.
    """

    source: Opened
    target: Opened
    epoch: int = 0
    number: int = 0

    async def close(self, *, politely: bool = True) -> None:
        """Close both; a server that hangs is not waited for long. May be repeated."""
        await close_side(self.source, politely=politely)
        await close_side(self.target, politely=politely)

    async def close_source(self) -> None:
        """Close only what was read from."""
        await close_side(self.source)


async def close_side(side: Opened, *, politely: bool = True) -> None:
    """Close one side; a server that hangs is not waited for long. May be repeated."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(DRAIN_S):
        await anyio.to_thread.run_sync(
            partial(side.end.close, politely=politely), abandon_on_cancel=True
        )


async def open_source(endpoint: Endpoint, *, wants_extents: bool = True) -> Opened:
    """Open what is read.

    Raises:
        ConnectError, SourceError: it can't be opened.
    """
    if endpoint.kind == "file":
        what = endpoint.fd if endpoint.fd is not None else endpoint.address
        end, info = open_source_file(what)
        return Opened(endpoint, end, info)
    return await connect(endpoint, [BASE_ALLOCATION] if wants_extents else [])


async def open_target(
    endpoint: Endpoint, size: int, source: Opened, *, keep: bool = False, wants_extents: bool = True
) -> Opened:
    """Open what is written, for ``size`` bytes; ``keep``: a file's content is not thrown away.

    Raises:
        ConnectError, TargetError, SizeMismatchError: it can't be opened or is too small.
    """
    if endpoint.kind == "null":
        return Opened(endpoint, NullEnd(), null_info(size))
    if endpoint.kind == "file":
        what = endpoint.fd if endpoint.fd is not None else endpoint.address
        reads = source.end if isinstance(source.end, FileEnd) else None
        end, info, is_zero = open_target_file(what, size, keep=keep, source=reads)
        return Opened(endpoint, end, info, is_zero)
    return await connect(endpoint, [BASE_ALLOCATION] if wants_extents else [])


async def another(opened: Opened, *, wants_extents: bool) -> Opened:
    """Open one more connection to the same side.

    Raises:
        ConnectError: nobody is there any more.
        CopyError: what is there now is something else.
    """
    if isinstance(opened.end, FileEnd):
        return replace(opened, end=opened.end.another())
    if opened.endpoint.kind == "null":
        return replace(opened, end=NullEnd())
    made = await connect(opened.endpoint, [BASE_ALLOCATION] if wants_extents else [])
    if made.info.size != opened.info.size:
        made.end.close()
        raise CopyError(
            f"‘{opened.endpoint}’ had {opened.info.size} bytes and now has {made.info.size}: "
            "it is not the same any more"
        )
    return replace(opened, end=made.end)


def template(opened: Opened) -> Opened:
    """Return what :func:`another` can open more from, also when ``opened`` has been closed.

    A file that was given open, or has been renamed since, can't be found again by its name.
    """
    if isinstance(opened.end, FileEnd):
        return replace(opened, end=opened.end.another())
    return opened


def can_reconnect(endpoint: Endpoint) -> bool:
    """Whether a lost connection can be made again: a server of our own has gone with it."""
    return endpoint.kind == "nbd"


def most_connections(source: Opened, target: Opened) -> int | None:
    """Return how many pairs both sides allow; None: any number.

    Without multi-conn a flush on one connection says nothing of what others wrote. A server of our
    own takes one client.
    """
    for side in (source, target):
        if side.endpoint.kind == "command" or not side.info.can_multi_conn:
            return 1
    return None


async def connect(endpoint: Endpoint, contexts: Sequence[str]) -> Opened:
    """Connect to an NBD server, or start one.

    Raises:
        ConnectError: nobody is there, or negotiation failed.
    """
    if endpoint.kind == "nbd":
        connection = await open_connection(endpoint.address, contexts=contexts)
        return Opened(endpoint, connection.handle, connection.info)
    handle = Handle(contexts)

    def start() -> ExportInfo:
        handle.connect_command(endpoint.argv)
        return handle.info()

    try:
        info = await anyio.to_thread.run_sync(start, abandon_on_cancel=True)
    except BaseException:
        handle.close(politely=False)
        raise
    return Opened(endpoint, handle, info)
