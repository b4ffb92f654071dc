"""One disk being copied: what is left to do, what has landed, what went wrong first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from v2v_async.errors import CopyError, NbdError, RequestError, SizeMismatchError
from v2v_async.events import Bytes
from v2v_async.handle import ExportInfo
from v2v_async.units import KIB, MIB

# 256 KiB is best for local servers (libnbd commit 6080434; shared/FACTS.md); with 512 KiB fewer
# requests are needed, which is what Python pays for. Both were equal in bytes a second.
REQUEST_SIZE = 512 * KIB
# Servers take larger ones, but a cancelled copy waits for those in flight.
ZERO_SIZE = 32 * MIB
# Extents are asked for one chunk ahead; a chunk is also what a lane takes at a time.
_LARGEST_CHUNK, _SMALLEST_CHUNK = 128 * MIB, 4 * MIB
# So many chunks a lane that an unlucky one does not finish long after the others.
_CHUNKS_PER_LANE = 16


@dataclass(slots=True)
class Counters:
    """Bytes that one lane has dealt with. Written by its thread alone, read by others."""

    examined: int = 0
    data: int = 0
    copied: int = 0
    zero: int = 0
    skipped: int = 0
    in_flight: int = 0
    most_in_flight: int = 0


@dataclass(slots=True)
class Geometry:
    """How a disk is cut. Sizes are bytes; ``block`` divides every inner boundary."""

    size: int
    target_size: int
    block: int
    target_block: int
    request_size: int
    zero_size: int
    chunk: int


def geometry(
    source: ExportInfo, target: ExportInfo, *, lanes: int, request_size: int | None = None
) -> Geometry:
    """Fit the request sizes to what both servers allow.

    Raises:
        SizeMismatchError: the target is smaller than the source.
        CopyError: the target is read-only, or their block sizes can't be combined.
    """
    if target.size < source.size:
        raise SizeMismatchError(
            f"the target has {target.size} bytes, the source {source.size}: it is too small"
        )
    if target.is_read_only:
        raise CopyError("the target is read-only")
    block = max(source.minimum_block, target.minimum_block, 1)
    for minimum in (source.minimum_block, target.minimum_block):
        if block % minimum:
            raise CopyError(
                f"block sizes {source.minimum_block} and {target.minimum_block} don't go together"
            )
    largest = min(source.maximum_block, target.maximum_block)
    wanted = min(request_size or REQUEST_SIZE, largest)
    size = max(wanted // block * block, block)
    chunk = source.size // max(1, lanes * _CHUNKS_PER_LANE)
    chunk = min(max(chunk, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    chunk = -(-chunk // size) * size
    return Geometry(
        size=source.size,
        target_size=target.size,
        block=block,
        target_block=target.minimum_block,
        request_size=size,
        zero_size=max(ZERO_SIZE // block * block, block),
        chunk=chunk,
    )


@dataclass
class DiskCopy:
    """A disk that several lanes, perhaps in several threads, copy together.

    ``is_known_zero``: the target reads as zeroes wherever nothing was written. ``can_zero``: its
    server makes zeroes by itself.
    """

    index: int
    geometry: Geometry
    is_known_zero: bool
    can_zero: bool
    can_extents: bool
    counters: list[Counters] = field(default_factory=list)
    error: BaseException | None = None
    is_cancelled: bool = False
    wake: Callable[[], None] = lambda: None
    """Makes the workers look at their lanes; called, in any thread, when the disk is to stop."""
    _position: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def claim(self) -> tuple[int, int] | None:
        """Take the next chunk (offset, length), None when there is none or no more is wanted.

        The last ones may lie behind the source: what the target has there must become zeroes.
        """
        if self.is_stopping:
            return None
        with self._lock:
            offset = self._position
            end = self.geometry.size
            if offset >= end:
                if self.is_known_zero:
                    return None
                # The source's last block was padded to a whole one of the target.
                unit = self.geometry.target_block
                offset = max(offset, -(-end // unit) * unit)
                end = self.geometry.target_size
            length = min(self.geometry.chunk, end - offset)
            if length <= 0:
                return None
            self._position = offset + length
            return offset, length

    def fail(self, op: str, error: BaseException, offset: int | None = None) -> None:
        """Note the first error; the lanes then finish what is in flight and stop."""
        with self._lock:
            if self.error is not None:
                return
            if isinstance(error, NbdError) and not isinstance(error, RequestError):
                wrapped: BaseException = CopyError(
                    f"{op}: {error.message}", disk=self.index, offset=offset
                )
            elif isinstance(error, RequestError):
                wrapped = CopyError(error.message, disk=self.index, offset=error.offset)
            else:
                wrapped = error
            wrapped.__cause__ = error if wrapped is not error else None
            self.error = wrapped
        # A lane that waits for a server which hangs would otherwise not learn of it.
        self.wake()

    def cancel(self) -> None:
        """Ask the lanes to finish what is in flight and stop."""
        self.is_cancelled = True
        self.wake()

    @property
    def is_stopping(self) -> bool:
        """Whether no new request may be sent."""
        return self.is_cancelled or self.error is not None

    def bytes(self) -> Bytes:
        """Return what has landed so far."""
        total = self.geometry.size
        counters = self.counters
        copied = sum(c.copied for c in counters)
        zero = sum(c.zero for c in counters)
        skipped = sum(c.skipped for c in counters)
        data = sum(c.data for c in counters)
        examined = sum(c.examined for c in counters)
        return Bytes(
            total=total,
            data=max(data + total - examined, copied),
            copied=copied,
            zero=zero,
            skipped=skipped,
        )
