"""Disks for a measurement: made, kept in the page cache, and compared afterwards."""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from errno import ENXIO
from pathlib import Path

from v2v_async.bench.suite import Disk, Pieces
from v2v_async.errors import V2VError, VerifyError
from v2v_async.units import MIB

_POOL_SIZE = 8 * MIB
_STEP = 4099
"""Odd, a prime and over a page: pieces start all over the pool, so a misplaced one is noticed."""

_READ_SIZE = 8 * MIB


def make(path: Path, disk: Disk, *, seed: int) -> None:
    """Write a raw sparse disk. What is data can't be compressed and has no zero block."""
    pool = random.Random(seed).randbytes(_POOL_SIZE).replace(b"\0", b"\1")
    content = disk.content
    with path.open("wb", buffering=0) as file:
        file.truncate(disk.size)
        if content == "none":
            return
        pieces = content if isinstance(content, Pieces) else Pieces(run=MIB, every=MIB, until=MIB)
        until = min(content.until, disk.size) if isinstance(content, Pieces) else disk.size
        for offset in range(0, until, pieces.every):
            _write(file.fileno(), pool, offset, min(pieces.run, disk.size - offset))


def _write(fd: int, pool: bytes, offset: int, length: int) -> None:
    view = memoryview(pool)
    while length:
        part = min(length, MIB)
        start = (offset // 4096) * _STEP % (_POOL_SIZE - MIB)
        written = os.pwrite(fd, view[start : start + part], offset)
        offset, length = offset + written, length - written


def make_target(path: Path, size: int, image_format: str) -> None:
    """Make an empty target."""
    if image_format == "raw":
        with path.open("wb") as file:
            file.truncate(size)
        return
    command = ["qemu-img", "create", "-q", "-f", image_format, str(path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise V2VError(f"can't make {path}: {done.stderr.strip()}")


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what a file has data for. Source: lseek(2), SEEK_DATA."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end - start


def warm(path: Path) -> None:
    """Read a file's data once, so that it is in the page cache."""
    buffer = bytearray(_READ_SIZE)
    with path.open("rb", buffering=0) as file:
        for offset, length in data_ranges(file.fileno()):
            while length > 0:
                view = memoryview(buffer)[: min(length, _READ_SIZE)]
                count = os.preadv(file.fileno(), [view], offset)
                offset, length = offset + count, length - count


def compare(source: str, target: str, *, target_format: str = "raw") -> None:
    """Compare a raw source with a target (files or NBD URIs) by ``qemu-img compare``.

    Raises:
        VerifyError: they differ, with the first offset.
        V2VError: they can't be compared.
    """
    command = ["qemu-img", "compare", "-f", "raw", "-F", target_format, source, target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    said = (done.stdout + done.stderr).strip()
    # Source: qemu-img(1): 1 is ‘images differ’, 2 and up are errors.
    if done.returncode != 1:
        raise V2VError(f"can't compare the copy with its source: {said}")
    offset = re.search(r"offset (\d+)", said)
    place = int(offset[1]) if offset else 0
    raise VerifyError(f"wrong bytes: {said.splitlines()[0]}", ranges=[(place, 1)], offset=place)


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    with suppress(FileNotFoundError):
        path.unlink()
