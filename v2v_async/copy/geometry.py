"""How a disk is cut: sizes that both servers allow.

A target may be larger than the source; what it has behind that is left alone, as nbdcopy does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from v2v_async.errors import CopyError, SizeMismatchError
from v2v_async.handle import ExportInfo
from v2v_async.units import KIB, MIB

# To a file in memory 4 GiB took 3.2 s with 512 KiB, where lanes write at the same time, 3.5 s with
# 1 MiB (3.2-5.1 s, as the kernel's locks have it) and 3.3 s with 256 KiB; to null all were equal.
REQUEST_SIZE = 512 * KIB
LARGEST_REQUEST = 4 * MIB
"""HTTP-like sources gain up to here (virt-v2v commit 7ebb2c8d; shared/FACTS.md)."""
# Servers take larger ones, but a cancelled copy waits for those in flight.
_ZERO_SIZE = 32 * MIB
SPARSE = 4 * KIB
"""Zeroes in data are looked for in blocks of this size, as nbdcopy does: with runs of 32 KiB or
more only, a fragmented disk took 21% more room."""
# Extents are asked for one chunk ahead; a chunk is also what a lane takes at a time.
_LARGEST_CHUNK, _SMALLEST_CHUNK = 128 * MIB, 4 * MIB
# So many chunks a lane that an unlucky one does not finish long after the others.
_CHUNKS_PER_LANE = 16


@dataclass(slots=True)
class Geometry:
    """Sizes are bytes; ``block`` divides every inner boundary, ``request_size`` and ``chunk``."""

    size: int
    block: int
    target_block: int
    request_size: int
    largest_request: int
    zero_size: int
    sparse: int
    chunk: int


def smaller_chunk(shape: Geometry) -> int:
    """Return a chunk size for connections that are lost now and then.

    What a lane had of its chunk is read again, so that a chunk must take less time than they last.
    """
    half = max(shape.chunk // 2, min(_SMALLEST_CHUNK, shape.chunk))
    return -(-half // shape.request_size) * shape.request_size


def geometry(
    source: ExportInfo,
    target: ExportInfo,
    *,
    lanes: int,
    request_size: int | None = None,
    sparse: int | None = None,
) -> Geometry:
    """Fit the request sizes to what both servers allow.

    ``request_size`` and ``sparse`` are what a person asked for.

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
    block = lcm(source.minimum_block, target.minimum_block)
    largest = min(source.maximum_block, target.maximum_block)
    if block > largest:
        raise CopyError(
            f"the block sizes {source.minimum_block} (source) and {target.minimum_block} (target) "
            f"need requests of {block} bytes, and {largest} is the most that both servers take"
        )
    # What the ends prefer, as long as it is no larger than a request should be.
    preferred = min(max(source.preferred_block, target.preferred_block), LARGEST_REQUEST)
    wanted = request_size or max(REQUEST_SIZE, preferred)
    cut = max(min(wanted, largest) // block * block, block)
    chunk = source.size // max(1, lanes * _CHUNKS_PER_LANE)
    chunk = min(max(chunk, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    if sparse is None:
        sparse = min(max(SPARSE, target.preferred_block), 64 * KIB)
    if sparse:
        sparse = lcm(max(sparse, target.minimum_block), target.minimum_block)
    return Geometry(
        size=source.size,
        block=block,
        target_block=target.minimum_block,
        request_size=cut,
        largest_request=max(min(largest, max(LARGEST_REQUEST, cut)) // block * block, block),
        zero_size=max(min(_ZERO_SIZE, target.maximum_block) // block * block, block),
        sparse=sparse,
        chunk=-(-chunk // cut) * cut,
    )
