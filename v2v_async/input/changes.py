"""What was written over an overlay: found out, saved, and written over another disk.

nbdkit's cow filter keeps what is written in a file without a name, and does not tell where it
differs from the source. Its log filter tells what it was asked. qemu-nbd tells how deep below a
qcow2 overlay each extent lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread

from v2v_async.connection import Connection, connected
from v2v_async.errors import NbdError
from v2v_async.units import MIB

_REQUEST = 2 * MIB
# Changes are kept in whole blocks of the smallest size a cow overlay has: to restore a part of one
# would first read the rest of it from the source.
_BLOCK = 4096
_ZERO = 2  # NBD_STATE_ZERO of base:allocation
ALLOCATION_DEPTH = "qemu:allocation-depth"
"""The context in which qemu-nbd tells the depth: 1 is the overlay itself (qemu-nbd(8), ``-A``)."""
_IN_OVERLAY = 1
_CHANGE = re.compile(rb" (Write|Zero|Trim) id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+) ")
_MOST_ZEROES = 1024 * MIB  # of one request: servers take 32 bits

Range = tuple[int, int]
"""Offset and length in bytes."""


def read_changes(log: Path, size: int) -> list[Range]:
    """Return what has been written to a disk of ``size`` bytes, in blocks, by its nbdkit's log.

    Source: nbdkit-log-filter(1), "LOG FILE FORMAT".
    """
    with log.open("rb") as lines:
        return merged(_changes(lines), size)


def _changes(lines: Iterable[bytes]) -> Iterator[Range]:
    for line in lines:
        match = _CHANGE.search(line)
        if match is not None:
            yield int(match[2], 16), int(match[3], 16)


def merged(ranges: Iterable[Range], size: int) -> list[Range]:
    """Return ranges in whole blocks, sorted, without overlaps, within a disk of ``size`` bytes."""
    found: list[Range] = []
    for offset, length in sorted(ranges):
        start = offset // _BLOCK * _BLOCK
        end = min(-(-(offset + length) // _BLOCK) * _BLOCK, size)
        if found and start <= sum(found[-1]):
            before = found.pop()
            start, end = before[0], max(end, sum(before))
        if end > start:
            found.append((start, end - start))
    return found


async def read_depth(connection: Connection) -> list[Range]:
    """Return what has been written to a qcow2 overlay that qemu-nbd serves, in blocks.

    The connection has negotiated ALLOCATION_DEPTH.

    Raises:
        NbdError: the server can't tell.
    """
    size = connection.info.size
    found: list[Range] = []
    offset = 0
    while offset < size:
        ask = partial(
            connection.handle.extents_now,
            min(size - offset, _MOST_ZEROES),
            offset,
            ALLOCATION_DEPTH,
        )
        told = await anyio.to_thread.run_sync(ask)
        if not told:
            raise NbdError(f"the server of ‘{connection.endpoint}’ tells no {ALLOCATION_DEPTH}")
        for length, depth in told:
            if depth == _IN_OVERLAY:
                found.append((offset, length))
            offset += length
    return merged(found, size)


async def classify(connection: Connection, changed: list[Range]) -> tuple[list[Range], list[Range]]:
    """Return which of the ranges that have changed are data, and which are zeroes.

    Raises:
        NbdError: the server can't be asked.
    """
    handle = connection.handle
    data: list[Range] = []
    zero: list[Range] = []

    def extents(offset: int, length: int) -> list[tuple[int, int]]:
        if not connection.info.has_extents:
            return [(length, 0)]
        return handle.extents_now(min(length, _MOST_ZEROES), offset) or [(length, 0)]

    for start, whole in changed:
        offset, end = start, start + whole
        while offset < end:
            for found, flags in await anyio.to_thread.run_sync(extents, offset, end - offset):
                length = min(found, end - offset)
                if length == 0:
                    break
                (zero if flags & _ZERO else data).append((offset, length))
                offset += length
    return data, zero


async def save(
    connection: Connection, changed: list[Range], path: Path
) -> tuple[list[Range], list[Range]]:
    """Copy what has changed to ``path``, to the same offsets; return which is data, and zeroes.

    Raises:
        NbdError: it can't be read.
        OSError: it can't be written.
    """
    handle = connection.handle
    request = min(_REQUEST, connection.info.maximum_block)
    data, zero = await classify(connection, changed)

    def copy(file: IO[bytes], offset: int, length: int) -> None:
        file.seek(offset)
        file.write(handle.read_now(length, offset))

    with path.open("wb") as file:
        file.truncate(connection.info.size)
        for offset, length in data:
            for at in range(offset, offset + length, request):
                part = min(request, offset + length - at)
                await anyio.to_thread.run_sync(partial(copy, file, at, part))
    return data, zero


async def restore(endpoint: str, data: list[Range], zero: list[Range], path: Path) -> None:
    """Write over a fresh overlay what :func:`save` has told and put into ``path``.

    Raises:
        NbdError: it can't be written.
        OSError: ``path`` can't be read.
    """
    with path.open("rb") as file:
        async with connected(endpoint) as connection:
            await _restore(connection, data, zero, file)


async def _restore(
    connection: Connection, data: list[Range], zero: list[Range], file: IO[bytes]
) -> None:
    handle = connection.handle
    request = min(_REQUEST, connection.info.maximum_block)

    def write(offset: int, length: int) -> None:
        file.seek(offset)
        content = file.read(length)
        if len(content) != length:
            raise OSError(None, "it is shorter than it was")
        handle.write_now(memoryview(content), offset)

    for start, whole in data:
        for offset in range(start, start + whole, request):
            length = min(request, start + whole - offset)
            await anyio.to_thread.run_sync(write, offset, length)
    for start, whole in zero:
        for offset in range(start, start + whole, _MOST_ZEROES):
            length = min(_MOST_ZEROES, start + whole - offset)
            await anyio.to_thread.run_sync(partial(_make_zero, connection, offset, length))
    await anyio.to_thread.run_sync(handle.flush_now)


def _make_zero(connection: Connection, offset: int, length: int) -> None:
    """Have a range read as zeroes; by trimming where that does it, so that it takes no room."""
    handle, end = connection.handle, offset + length
    if connection.info.can_trim and connection.info.has_extents:
        handle.trim_now(length, offset)
        while offset < end:
            for found, flags in handle.extents_now(end - offset, offset):
                part = min(found, end - offset)
                if not flags & _ZERO:
                    _write_zeroes(connection, offset, part)
                offset += part
        return
    _write_zeroes(connection, offset, length)


def _write_zeroes(connection: Connection, offset: int, length: int) -> None:
    if connection.info.can_zero:
        connection.handle.zero_now(length, offset)
        return
    nothing = memoryview(bytes(min(_REQUEST, connection.info.maximum_block, length)))
    for at in range(offset, offset + length, len(nothing)):
        connection.handle.write_now(nothing[: offset + length - at], at)
