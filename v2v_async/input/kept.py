"""Overlays that are kept: what the conversion changed outlives the servers, in the v2v directory.

::

    setup ──> convert ──> settle ──> copy …         overlay-N.json     whose it is; from ``settle``
                             │                                         on: the conversion is in it
         killed at any time ─┤                      overlay-N.qcow2    a qcow2 overlay, or
                             v                      overlay-N.changes  what was written over a cow
    setup of a later process: settled? served again with its content; else made anew

The cow filter's own file has no name and goes with its server, so what is written is noted by
nbdkit's log filter (``overlay-N.log``) and ``settle`` reads it back: ``overlay-N.changes`` holds it
at the same offsets, and is sparse. :func:`restore` writes it over a fresh overlay.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
from pydantic import ValidationError

from v2v_async.connection import Connection, connected
from v2v_async.durable import sync
from v2v_async.errors import ConnectError, SourceError, V2VError
from v2v_async.handle import BASE_ALLOCATION
from v2v_async.input import changes
from v2v_async.input.changes import (
    ALLOCATION_DEPTH,
    Range,
    classify,
    merged,
    read_changes,
    read_depth,
    save,
)
from v2v_async.input.image import DiskSource, FileImage
from v2v_async.model import Model
from v2v_async.redact import redact
from v2v_async.v2vdir import V2VDir

Kind = Literal["cow", "qcow2"]


class OverlayRecord(Model):
    """``overlay-N.json``. Sizes are bytes.

    ``written_ns``: when a local source was written last. ``data`` and ``zero`` are what was changed
    over a cow.
    """

    version: Literal[1] = 1
    kind: Kind
    source: str
    format: str
    size: int
    written_ns: int | None = None
    is_settled: bool = False
    data: list[Range] = []
    zero: list[Range] = []


def qcow2_path(v2vdir: V2VDir, index: int) -> Path:
    """Return where disk ``index`` has its qcow2 overlay."""
    return v2vdir.path / f"overlay-{index}.qcow2"


def log_path(v2vdir: V2VDir, index: int) -> Path:
    """Return where nbdkit notes the requests to the cow overlay of disk ``index``."""
    return v2vdir.path / f"overlay-{index}.log"


def is_kept(v2vdir: V2VDir, index: int) -> bool:
    """Whether disk ``index`` has an overlay that holds a finished conversion."""
    record = _read(v2vdir, index)
    return record is not None and record.is_settled


def begin(v2vdir: V2VDir, index: int, kind: Kind, source: DiskSource, size: int) -> None:
    """Note that an overlay has been made that is to be kept; ``size`` is its export's."""
    _write(
        v2vdir,
        index,
        OverlayRecord(
            kind=kind,
            source=redact(source.image.shown),
            format=source.format,
            size=size,
            written_ns=_written(source),
        ),
    )


def settled(v2vdir: V2VDir, index: int, kind: Kind, source: DiskSource) -> OverlayRecord | None:
    """Return the record of an overlay to go on from; None where there is none.

    Raises:
        SourceError: there is one, but of another disk, or of one that was written since.
    """
    record = _read(v2vdir, index)
    if record is None or not record.is_settled:
        return None
    shown, path = redact(source.image.shown), _record_path(v2vdir, index)
    why = None
    if (record.source, record.format, record.kind) != (shown, source.format, kind):
        why = f"it is of ‘{record.source}’ ({record.format})"
    elif record.written_ns != _written(source):
        why = "the source has been written or replaced since"
    if why is not None:
        raise SourceError(
            f"what the conversion made of ‘{shown}’ ({source.format}) can't be used: {why}",
            hint=f"convert it again: remove ‘{path.parent}’",
        )
    return record


def check_size(v2vdir: V2VDir, index: int, record: OverlayRecord, size: int) -> None:
    """See that the source still has the size it had.

    Raises:
        SourceError
    """
    if record.size != size:
        raise SourceError(
            f"‘{record.source}’ has {size} bytes now, and had {record.size} when it was converted",
            hint=f"convert it again: remove ‘{v2vdir.path}’",
        )


def discard(v2vdir: V2VDir, index: int | None = None) -> None:
    """Remove what is kept of disk ``index`` (None: of all disks), so that the next is made anew.

    Their servers must have been stopped.
    """
    # The record first: without it the rest is nobody's.
    for suffix in (".json", ".json.new", ".qcow2", ".qcow2.new", ".changes", ".log"):
        for path in v2vdir.path.glob(f"overlay-{'*' if index is None else index}{suffix}"):
            path.unlink(missing_ok=True)


async def settle(v2vdir: V2VDir) -> None:
    """Have on the disk what the conversion wrote to the overlays, so that a later run can go on.

    The overlays are served, and nobody writes to them any more. A loss of power after it loses
    nothing of what is in the v2v directory. May be repeated.

    Raises:
        V2VError: an overlay is of the kind that goes with its server, or can't be read; or there is
            no room for what it holds.
    """
    found: dict[int, OverlayRecord] = {}
    for disk in v2vdir.read_source().disks:
        record = _read(v2vdir, disk.index)
        if record is None:
            raise _goes_with_its_server(disk.index)
        if record.is_settled:
            continue
        try:
            found[disk.index] = await _settle_disk(v2vdir, disk.index, record)
        except V2VError as error:
            error.locate(disk=disk.index)
            raise
    try:
        # A record that says so must not be on the disk before what it tells of.
        await anyio.to_thread.run_sync(_sync_below, v2vdir.path)
        for index, record in found.items():
            _write(v2vdir, index, record.model_copy(update={"is_settled": True}))
        await anyio.to_thread.run_sync(_sync_below, v2vdir.path)
    except OSError as error:
        raise _not_kept(v2vdir.path, error) from error


async def _settle_disk(v2vdir: V2VDir, index: int, record: OverlayRecord) -> OverlayRecord:
    log = log_path(v2vdir, index)
    try:
        async with connected(str(v2vdir.source_socket(index))) as connection:
            flush = connection.handle.flush_now
            if record.kind == "qcow2":
                await anyio.to_thread.run_sync(flush)
                return record
            changed = await _noted(connection, log, record.size)
            data, zero = await save(connection, changed, _changes_path(v2vdir, index))
    except ConnectError as error:
        raise _not_served(index, error) from error
    except OSError as error:
        raise _not_kept(_changes_path(v2vdir, index), error) from error
    log.unlink(missing_ok=True)  # nbdkit goes on writing to it, which nobody reads
    return record.model_copy(update={"data": data, "zero": zero})


async def _noted(connection: Connection, log: Path, size: int) -> list[Range]:
    """Return what was written to a cow overlay of ``size`` bytes, by the log of its nbdkit."""
    before = log.stat().st_size
    await anyio.to_thread.run_sync(connection.handle.flush_now)
    if log.stat().st_size == before:
        raise V2VError(f"nbdkit does not note in ‘{log}’ what is asked of it")
    return await anyio.to_thread.run_sync(read_changes, log, size)


async def save_changes(v2vdir: V2VDir, index: int, path: Path) -> tuple[list[Range], list[Range]]:
    """Copy what has changed on disk ``index`` to ``path``, to the same offsets.

    Its overlay is served and nobody writes to it any more. Returns which ranges have data, and
    which are zeroes now.

    Raises:
        V2VError: the overlay is of the kind that does not tell, or can't be read.
        OSError: ``path`` can't be written.
    """
    async with _changed(v2vdir, index) as (connection, changed):
        return await save(connection, changed, path)


async def changed_so_far(v2vdir: V2VDir, index: int) -> list[Range]:
    """Return what has been written to the overlay of disk ``index``; somebody may go on writing.

    Raises:
        V2VError: the overlay is of the kind that does not tell, or can't be read.
    """
    async with _changed(v2vdir, index) as (_, changed):
        return changed


async def classify_changes(
    v2vdir: V2VDir, index: int, also: Iterable[Range] = ()
) -> tuple[list[Range], list[Range]]:
    """Return where disk ``index`` has other data now, and where it has become zeroes.

    Its overlay is served and nobody writes to it any more. Ranges that are told ``also`` count as
    changed, whatever they are.

    Raises:
        V2VError: the overlay is of the kind that does not tell, or can't be read.
    """
    async with _changed(v2vdir, index) as (connection, changed):
        return await classify(connection, merged([*changed, *also], connection.info.size))


@asynccontextmanager
async def _changed(v2vdir: V2VDir, index: int) -> AsyncIterator[tuple[Connection, list[Range]]]:
    """Have a connection to an overlay, and what has been written to it."""
    record = _read(v2vdir, index)
    if record is None:
        raise _goes_with_its_server(index)
    is_cow = record.kind == "cow"
    contexts = (BASE_ALLOCATION,) if is_cow else (BASE_ALLOCATION, ALLOCATION_DEPTH)
    try:
        async with connected(str(v2vdir.source_socket(index)), contexts=contexts) as connection:
            if is_cow:
                changed = await _noted(connection, log_path(v2vdir, index), record.size)
            else:
                changed = await read_depth(connection)
            yield connection, changed
    except ConnectError as error:
        raise _not_served(index, error) from error


async def restore(v2vdir: V2VDir, index: int, record: OverlayRecord) -> None:
    """Write what the conversion changed over the fresh cow overlay that ``inINDEX`` serves.

    Raises:
        NbdError: it can't be written.
        SourceError: what was kept can't be read.
    """
    path = _changes_path(v2vdir, index)
    endpoint = str(v2vdir.source_socket(index))
    try:
        await changes.restore(endpoint, record.data, record.zero, path)
    except OSError as error:
        raise SourceError(
            f"what the conversion wrote can't be read from ‘{path}’: {error.strerror}",
            hint=f"convert it again: remove ‘{v2vdir.path}’",
            disk=index,
        ) from error


def _written(source: DiskSource) -> int | None:
    """Return when a local file was written last; a device does not tell, nor do others."""
    if not isinstance(source.image, FileImage):
        return None
    with suppress(OSError):
        if source.image.path.is_file():
            return source.image.path.stat().st_mtime_ns
    return None


def _goes_with_its_server(index: int) -> V2VError:
    return V2VError(
        f"what the conversion wrote to disk {index} can't be kept: its overlay goes with its "
        "server",
        hint="-io overlay=kept",
        disk=index,
    )


def _not_served(index: int, error: ConnectError) -> V2VError:
    return V2VError(
        f"the overlay of disk {index} is not served any more: what the conversion wrote to it "
        f"can't be kept ({error.message})"
    )


def _not_kept(path: Path, error: OSError) -> V2VError:
    return V2VError(
        f"what the conversion wrote can't be kept in ‘{path}’: {error.strerror}",
        hint="free space there",
    )


def _record_path(v2vdir: V2VDir, index: int) -> Path:
    return v2vdir.path / f"overlay-{index}.json"


def _changes_path(v2vdir: V2VDir, index: int) -> Path:
    return v2vdir.path / f"overlay-{index}.changes"


def _read(v2vdir: V2VDir, index: int) -> OverlayRecord | None:
    path = _record_path(v2vdir, index)
    try:
        return OverlayRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise SourceError(
            f"‘{path}’ can't be read: {error}",
            hint=f"convert it again: remove ‘{v2vdir.path}’",
            disk=index,
        ) from error


def _write(v2vdir: V2VDir, index: int, record: OverlayRecord) -> None:
    path = _record_path(v2vdir, index)
    new = path.with_name(f"{path.name}.new")
    new.write_text(record.model_dump_json() + "\n")
    new.replace(path)


def _sync_below(folder: Path) -> None:
    """Have all files of a folder on the disk, and their names."""
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder and "log" in folders:
            folders.remove("log")
        for name in [*names, "."]:
            path = Path(parent, name)
            # Sockets can't be opened; what is removed meanwhile is nobody's.
            if path.is_file() or path.is_dir():
                with suppress(FileNotFoundError):
                    sync(path)
    sync(folder.parent)
