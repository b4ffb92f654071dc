"""Samples of a disk: enough to tell at resume that source and target are the ones of then."""

from __future__ import annotations

import hashlib
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from v2v_async.copy.ranges import Ranges
from v2v_async.units import KIB, MIB

BLOCK = 4 * KIB  # a sample: the smallest block in which most file systems change
SAMPLES = 64  # finds a twentieth of the disk gone in 96 of 100 cases; takes 64 short reads

Read = Callable[[int, int], bytes]
"""Reads from one side: offset, length (in bytes) to exactly that many bytes."""


class Sample(NamedTuple):
    """What ``length`` bytes at ``offset`` held."""

    offset: int
    length: int
    digest: str

    @property
    def is_zero(self) -> bool:
        """Whether they were zeroes."""
        return self.digest == digest(bytes(self.length))


def digest(content: bytes | memoryview) -> str:
    """Return the digest of a sample, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def sample_offsets(size: int, seed: int = 0) -> list[int]:
    """Return up to 64 offsets of blocks spread over a disk, in order; the same ones each time.

    Among them are the first and the last block, and the one at 1 MiB: there most partition tools
    put the first file system, whose superblock changes with every mount.
    """
    blocks = -(-size // BLOCK)
    if blocks <= SAMPLES:
        return [block * BLOCK for block in range(blocks)]
    chosen = {0, blocks - 1}
    if blocks > MIB // BLOCK:
        chosen.add(MIB // BLOCK)
    strata = SAMPLES - len(chosen)
    for stratum in range(strata):
        first, after = blocks * stratum // strata, blocks * (stratum + 1) // strata
        drawn = hashlib.blake2b(b"%d %d" % (seed, stratum), digest_size=8).digest()
        chosen.add(first + int.from_bytes(drawn, "big") % (after - first))
    return [block * BLOCK for block in sorted(chosen)]


def identify(read: Read, size: int, offsets: Iterable[int] | None = None) -> list[Sample]:
    """Return samples of a disk of ``size`` bytes, by default at :func:`sample_offsets`."""
    samples = []
    for offset in sample_offsets(size) if offsets is None else offsets:
        length = min(BLOCK, size - offset)
        samples.append(Sample(offset, length, digest(read(offset, length))))
    return samples


def difference(samples: Iterable[Sample], read: Read) -> Sample | None:
    """Return the first of the samples that reads otherwise now, None where all are the same."""
    for sample in samples:
        if digest(read(sample.offset, sample.length)) != sample.digest:
            return sample
    return None


class WrittenSamples:
    """Samples of what was written that is not zero, spread evenly over all of it.

    They prove at resume that the target is the one that was written to: one made anew reads as
    zeroes, as does most of a sparse source. Kept are those with the lowest :func:`_rank`, so it
    does not matter who offers what in which order. For any threads; offering costs a
    multiplication, as all but a few hundred offers of a copy are turned down.
    """

    def __init__(self, samples: Iterable[Sample] = (), count: int = SAMPLES) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._kept = {sample.offset: sample for sample in samples}
        self._limit = 1 << 64
        self._trim()

    def offer(self, offset: int, content: memoryview) -> None:
        """Take note of data that is being written at ``offset``; its first block may be kept."""
        if _rank(offset) > self._limit:
            return
        block = bytes(content[:BLOCK])
        if block == bytes(len(block)):
            return
        with self._lock:
            self._kept[offset] = Sample(offset, len(block), digest(block))
            self._trim()

    def inside(self, done: Ranges) -> list[Sample]:
        """Return, in order, the samples that ``done`` (what has been flushed) holds whole."""
        with self._lock:
            kept = sorted(self._kept.values())
        return [sample for sample in kept if done.contains(sample.offset, sample.length)]

    def _trim(self) -> None:
        ranked = sorted(self._kept, key=_rank)
        for offset in ranked[self._count :]:
            del self._kept[offset]
        if len(ranked) >= self._count:
            self._limit = _rank(ranked[self._count - 1])


def _rank(offset: int) -> int:
    # Any mixing will do that gives each offset a place of its own, whatever it is a multiple of.
    mixed = (offset * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return ((mixed ^ (mixed >> 32)) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)


def spread(done: Ranges) -> list[tuple[int, int]]:
    """Return (offset, length) of blocks spread evenly over ``done``."""
    return done.places(SAMPLES // 2, BLOCK)


def file_identity(path: Path) -> str:
    """Return what changes when the file at ``path`` is written or replaced; empty: can't tell.

    For sources only: a target is written all the time. Device numbers change with a reboot, and
    are left out.
    """
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_ino}:{status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else ""
