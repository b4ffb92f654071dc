"""What has to be done with a chunk whose extents are known, and counting what was done."""

from __future__ import annotations

from dataclasses import dataclass, field

from v2v_async.copy.disk import Chunk, DiskCopy
from v2v_async.copy.plan import Part, Piece, Plan, arrange
from v2v_async.extent import STATE_ZERO, align_data, from_reply
from v2v_async.handle import Entries
from v2v_async.units import KIB

# Zeroes this short between data are read with it. Gaps of 4 KiB between 4 KiB of data then took
# 0.88-1.4 s instead of 1.36-1.95 s; those of 16 KiB cost more to read than the requests they save.
_BRIDGE = 8 * KIB
# A chunk without data is followed by a larger one, up to what a 32-bit reply can tell.
_LARGEST_EMPTY = 2 * 1024**3


@dataclass(slots=True)
class Reply:
    """A server's answer to a block-status request: extents, or an errno. Empty: not asked."""

    entries: Entries = field(default_factory=list)
    code: int = 0


class Stride:
    """How much a lane claims at a time, in bytes."""

    def __init__(self, disk: DiskCopy) -> None:
        self._base = disk.geometry.chunk
        self.size = self._base

    def follow(self, chunk: Chunk, at_least: int = 0) -> None:
        """Choose the next size after ``chunk`` has been planned: larger where it held no data."""
        if chunk.examined and not chunk.data:
            self.size = min(max(self.size, self._base) * 4, _LARGEST_EMPTY)
        else:
            self.size = max(self._base, -(-at_least // self._base) * self._base)


def plan_chunk(
    disk: DiskCopy, chunk: Chunk, source: Reply, target: Reply | None, size: int
) -> Plan:
    """Return the requests for a chunk, which is shortened to at most ``size`` bytes.

    A server that can't tell its extents is not asked again, and all of the chunk is data. The part
    of a chunk that a short answer left out goes back to the disk, to be asked for again.
    """
    if chunk.is_there:
        return Plan([(chunk.offset, chunk.end, "data")])
    parts = chunk.parts
    if parts is None:
        parts = disk.learn(chunk, _parts(disk, chunk, source, target), size)
    chunk.examined = chunk.length
    chunk.data = sum(end - offset for offset, end, kind in parts if kind == "data")
    return Plan(parts)


def _parts(disk: DiskCopy, chunk: Chunk, source: Reply, target: Reply | None) -> list[Part]:
    geometry = disk.geometry
    entries = [] if source.code else source.entries
    told = chunk.length
    if not entries:
        disk.can_extents = False
    else:
        said = sum(length for length, _ in entries)
        if said < told and chunk.offset + said < geometry.size:
            # What does not fill a block is data.
            told = min(max(said // geometry.block * geometry.block, geometry.block), told)
            if told < chunk.length:
                disk.shorten(chunk, told)
        elif said > told and not entries[-1][1] & STATE_ZERO:
            # The last extent goes on behind what was asked for. That there is data can be believed
            # of any server, and saves asking; for zeroes it is asked properly.
            end = -(-(chunk.offset + said) // geometry.block) * geometry.block
            disk.learn_data(chunk.end, min(end, geometry.size))
    zeroes = []
    if target is not None and target.code:
        disk.can_target_extents = False
    elif target is not None:
        known = from_reply(chunk.offset, told, target.entries)
        zeroes = [
            (extent.offset, extent.end)
            for extent in align_data(known, geometry.block, geometry.size)
            if extent.is_zero
        ]
    extents = align_data(from_reply(chunk.offset, told, entries), geometry.block, geometry.size)
    return arrange(extents, zeroes, all_zero=disk.is_known_zero, bridge=_BRIDGE)


# What was done with ranges of a chunk. Padding behind the end of the source is not counted.


def count_skipped(disk: DiskCopy, chunk: Chunk, offset: int, length: int) -> None:
    """Count zeroes that the target has already."""
    counted = disk.counted(offset, length)
    chunk.skipped += counted
    if disk.digest is not None:
        disk.digest.add_zeroes(offset, counted)


def count_zeroed(disk: DiskCopy, chunk: Chunk, offset: int, length: int) -> None:
    """Count zeroes that were made on the target."""
    counted = disk.counted(offset, length)
    chunk.zero += counted
    if disk.digest is not None:
        disk.digest.add_zeroes(offset, counted)


def count_written(
    disk: DiskCopy, chunk: Chunk, offset: int, view: memoryview, pieces: list[Piece]
) -> None:
    """Count what was read from ``offset`` into ``view`` and has landed, in ``pieces``.

    Only now is it added to the digest: where a source changes between two reads, the digest is
    that of the target.
    """
    if disk.digest is not None:
        disk.digest.add(offset, view)
    written = disk.written
    for start, length, is_zero in pieces:
        counted = disk.counted(offset + start, length)
        if not is_zero:
            chunk.copied += counted
            if disk.wrote is not None:
                disk.note_wrote(offset + start, counted)
            if written is not None:
                written.offer(offset + start, view[start : start + counted])
            continue
        chunk.data -= counted
        if disk.is_known_zero:
            chunk.skipped += counted
        else:
            chunk.zero += counted
