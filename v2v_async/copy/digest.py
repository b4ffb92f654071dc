"""A digest of a disk, from blocks that arrive in any order: the one that nbdcopy --blkhash prints.

::

    disk      | block | block | block | … | short |        all of one size but the last
    digest    H( H(block) H(block) H(block) … H(short)  size )      size: 8 bytes, little-endian

    folded into H already ──►|  run  |     |  run  |   | part |  run  |
                             0       n     gap          some bytes of one block

Digests of whole blocks wait in runs until all before them is folded in; a run of zero blocks is
only counted. A short block is not padded. An empty disk is H(size).

Source: nbdcopy(1) of libnbd 1.24, ‘--blkhash’; the blkhash project’s README for the idea. The size
at the end, its width and the short block were found by trying and hold for the 338 digests of
nbdcopy 1.24.4 that they were compared with (some of them are in the unit test).
"""

from __future__ import annotations

import functools
import hashlib
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from v2v_async.errors import UsageError
from v2v_async.units import GIB, KIB, MIB, parse_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
"""What nbdcopy 1.24 takes; upper and lower case are the same to it."""

_MAX_BLOCK_SIZE = 2 * GIB  # the largest that nbdcopy 1.24.4 takes
_STEP = 64 * KIB  # zeroes are compared and hashed in such pieces, which stay in the cache
_PEEK = (
    16  # bytes looked at before a whole block is compared: data rarely begins with so many zeroes
)
_FOLD_STEP = 2048  # digests in one update: at 64 KiB (sha256) the call itself no longer costs
_FOLD_AT_ONCE = 16  # such steps while others wait for the lock: under 1 ms with sha256


@dataclass(frozen=True, slots=True)
class DigestKind:
    """``algorithm`` is hashlib’s name of H; ``block_size`` is a power of two, in bytes."""

    algorithm: str = "sha256"
    block_size: int = 64 * KIB

    def __str__(self) -> str:
        for unit, suffix in ((MIB, "M"), (KIB, "k"), (1, "")):
            if self.block_size % unit == 0:
                return f"{self.algorithm}/{self.block_size // unit}{suffix}"
        raise AssertionError(self.block_size)


def parse_kind(text: str | None) -> DigestKind:
    """Return what ``ALGORITHM[/SIZE]`` means; nothing or an empty text is sha256/64k.

    Raises:
        UsageError: there is no such algorithm, or the size is none.
    """
    if not text:
        return DigestKind()
    algorithm, slash, size = text.partition("/")
    if algorithm.lower() not in ALGORITHMS:
        raise UsageError(
            f"‘{algorithm}’ is not a digest that can be computed",
            hint=f"use {', '.join(ALGORITHMS[:-1])} or {ALGORITHMS[-1]}, if wanted with the size"
            f" of a block: {DigestKind()} (this is the default)",
        )
    return DigestKind(algorithm.lower(), _parse_block_size(size) if slash else 64 * KIB)


def _parse_block_size(text: str) -> int:
    try:
        # nbdcopy counts in sectors of 512 bytes, too.
        sectors = text[-1:] in ("s", "S")
        size = parse_size(text[:-1]) * 512 if sectors else parse_size(text)
    except ValueError as error:
        raise UsageError(f"the block size of the digest: {error}") from error
    if size.bit_count() != 1 or size > _MAX_BLOCK_SIZE:
        raise UsageError(
            f"the block size of the digest, ‘{text}’, is not a power of two up to 2G",
            hint="use 64k unless another program’s digest has to be met",
        )
    return size


class DiskDigest:
    """The digest of one disk while it is copied. All methods may be called from any thread.

    ``size`` is the disk’s, in bytes; ``None`` for a stream, of which :meth:`end` tells it.

    A range may be added again, cut in another way: what it holds must be the same each time.
    Memory: ``digest_size`` for each block of data that is ahead of the first missing one, and the
    content of those blocks of which only a part has been added.
    """

    def __init__(self, kind: DigestKind, size: int | None) -> None:
        self.kind = kind
        self._size = size
        self._lock = threading.Lock()
        self._outer = _hash(kind.algorithm)
        self._folded = 0  # blocks
        self._runs: list[_Run] = []  # in the order of the disk, without overlap
        self._parts: dict[int, _Part] = {}  # by block

    @property
    def waiting(self) -> int:
        """The bytes held for what is ahead of the first missing block."""
        with self._lock:
            runs = sum(len(run.digests) for run in self._runs if run.digests is not None)
            return runs + sum(len(part.content) for part in self._parts.values())

    def add(self, offset: int, view: memoryview) -> None:
        """Take the disk’s content from ``offset``; ``view`` (of bytes) is not kept.

        Hashing is done here, outside of any lock. It is cheapest when the range starts and ends on
        a block: what is not a whole block is copied and waits for the rest of it.

        Raises:
            ValueError: it is not a range of this disk.
        """
        for at, length, is_whole in self._cut(offset, len(view)):
            content = view[at - offset : at - offset + length]
            if is_whole:
                self._insert(at // self.kind.block_size, self._digests(content))
            else:
                self._put(at, length, content)

    def add_zeroes(self, offset: int, length: int) -> None:
        """Take a range that reads as zeroes; see :meth:`add`. Costs the same for any length."""
        for at, piece, is_whole in self._cut(offset, length):
            if is_whole:
                self._insert(at // self.kind.block_size, piece // self.kind.block_size)
            else:
                self._put(at, piece, None)

    def end(self, size: int) -> None:
        """Tell the size of a stream, after everything has been added."""
        block, short = divmod(size, self.kind.block_size)
        with self._lock:
            self._size = size
            part = self._parts.get(block)
            if part is None or part.ranges[0][0] > 0 or part.ranges[0][1] < short:
                return  # it ended on a block, or hexdigest will say what is missing
            del self._parts[block]
        self._insert(block, self._digests(memoryview(part.content)[:short]))

    def hexdigest(self) -> str:
        """Return the digest; takes up to seconds for terabytes of zeroes (so: not in a loop).

        Raises:
            ValueError: a range has not been added yet. More can be added then.
        """
        with self._lock:
            self._fold(steps=None)
            if self._size is None:
                raise ValueError("the digest lacks the end of the stream")
            at = self._folded * self.kind.block_size
            if self._folded != -(-self._size // self.kind.block_size):
                raise ValueError(f"the digest lacks (some of) the block at offset {at}")
            outer = self._outer.copy()
        outer.update(self._size.to_bytes(8, "little"))
        return outer.hexdigest()

    def _cut(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (offset, length, whether these are whole blocks) for a range: up to 3 pieces."""
        end = offset + length
        if offset < 0 or length < 0 or (self._size is not None and end > self._size):
            raise ValueError(f"{length} bytes at {offset} are not on a disk of {self._size} bytes")
        block_size = self.kind.block_size
        while offset < end:
            stop = end // block_size * block_size
            is_whole = offset % block_size == 0 and stop > offset
            if not is_whole:
                stop = min(end, (offset // block_size + 1) * block_size)
            yield offset, stop - offset, is_whole
            offset = stop

    def _digests(self, content: memoryview) -> bytes:
        """Return the digests of the blocks in ``content``, joined."""
        algorithm, block_size = self.kind.algorithm, self.kind.block_size
        peek = bytes(min(_PEEK, block_size))
        digests = []
        for start in range(0, len(content), block_size):
            block = content[start : start + block_size]
            if block[:_PEEK] == peek and len(block) == block_size and _is_zero(block):
                digests.append(_zero_digest(algorithm, block_size))
            else:
                digests.append(_hash(algorithm, block).digest())
        return b"".join(digests)

    def _put(self, offset: int, length: int, content: memoryview | None) -> None:
        """Keep a part of one block (None: zeroes) until the rest of it is there."""
        block, start = divmod(offset, self.kind.block_size)
        with self._lock:
            if not self._gaps(block, block + 1):
                return
            part = self._parts.get(block)
            if part is None:
                room = self.kind.block_size
                if self._size is not None:
                    room = min(room, self._size - block * room)
                part = self._parts[block] = _Part(room)
            part.put(start, length, content)
            if part.ranges != [(0, len(part.content))]:
                return
            del self._parts[block]
        self._insert(block, self._digests(memoryview(part.content)))

    def _insert(self, start: int, blocks: bytes | int) -> None:
        """Take the digests of blocks, or a number of zero blocks, and fold in what is next."""
        size = self._outer.digest_size
        count = blocks if isinstance(blocks, int) else len(blocks) // size
        with self._lock:
            for first, stop in self._gaps(start, start + count):
                digests = None
                if not isinstance(blocks, int):
                    digests = bytearray(blocks[(first - start) * size : (stop - start) * size])
                self._place(_Run(first, stop - first, digests))
            self._fold(_FOLD_AT_ONCE)

    def _gaps(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges of blocks in ``[start, stop)`` whose digests are not there yet."""
        gaps = []
        position = max(start, self._folded)
        index = bisect_right(self._runs, position, key=_start) - 1
        for run in self._runs[max(index, 0) :]:
            if run.start >= stop:
                break
            if run.start > position:
                gaps.append((position, run.start))
            position = max(position, run.start + run.count)
        if position < stop:
            gaps.append((position, stop))
        return gaps

    def _place(self, run: _Run) -> None:
        """Add a run where there is none, to the end of its neighbour if they are alike."""
        index = bisect_left(self._runs, run.start, key=_start)
        before = self._runs[index - 1] if index else None
        if before is None or before.start + before.count != run.start:
            self._runs.insert(index, run)
        elif before.digests is None and run.digests is None:
            before.count += run.count
        elif before.digests is not None and run.digests is not None:
            before.count += run.count
            before.digests += run.digests
        else:
            self._runs.insert(index, run)

    def _fold(self, steps: int | None) -> None:
        """Hash the digests that are next in order, but no more than ``steps`` steps.

        A run of zeroes may stand for terabytes: the rest of it waits for the next call, so that
        one thread never holds up the others of its disk for long.
        """
        size = self._outer.digest_size
        while self._runs and self._runs[0].start == self._folded and steps != 0:
            run = self._runs[0]
            count = min(run.count, _FOLD_STEP)
            if run.digests is None:
                self._outer.update(_zero_digests(self.kind)[: count * size])
            else:
                self._outer.update(run.digests[: count * size])
                del run.digests[: count * size]  # a bytearray drops its front without moving
            run.start += count
            run.count -= count
            self._folded = run.start
            if not run.count:
                del self._runs[0]
            if steps is not None:
                steps -= 1


@dataclass(slots=True)
class _Run:
    """The digests of ``count`` blocks; None for the same number of zero blocks."""

    start: int
    count: int
    digests: bytearray | None


def _start(run: _Run) -> int:
    return run.start


class _Part:
    """A block that is not complete: its content, zeroes where unknown, and what is known of it."""

    __slots__ = ("content", "ranges")

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)
        self.ranges: list[tuple[int, int]] = []  # (start, stop), apart and in order

    def put(self, start: int, length: int, content: memoryview | None) -> None:
        """Take a piece of the block (None: zeroes)."""
        if content is not None:
            self.content[start : start + length] = content
        ranges: list[tuple[int, int]] = []
        for first, stop in sorted([*self.ranges, (start, start + length)]):
            if ranges and first <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(stop, ranges[-1][1]))
            else:
                ranges.append((first, stop))
        self.ranges = ranges


def _hash(algorithm: str, content: ReadableBuffer = b"") -> hashlib._Hash:
    # Not for security: where only approved algorithms may be used for that, md5 still works.
    return hashlib.new(algorithm, content, usedforsecurity=False)


def _is_zero(block: memoryview) -> bool:
    # Comparing bytes is memcmp; memoryviews are compared item by item, 40 times as slow.
    zeroes = bytes(min(_STEP, len(block)))
    return all(
        block[start : start + _STEP].tobytes() == zeroes for start in range(0, len(block), _STEP)
    )


@functools.lru_cache(maxsize=64)
def _zero_digest(algorithm: str, length: int) -> bytes:
    zeroes = bytes(min(_STEP, length))
    digest = _hash(algorithm)
    for _ in range(length // _STEP):
        digest.update(zeroes)
    digest.update(zeroes[: length % _STEP])
    return digest.digest()


@functools.lru_cache(maxsize=4)
def _zero_digests(kind: DigestKind) -> memoryview:
    return memoryview(_zero_digest(kind.algorithm, kind.block_size) * _FOLD_STEP)
