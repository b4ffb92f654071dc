"""A script for nbdkit's python plugin: a disk that forgets at SIGKILL what was not flushed.

Writes stay in memory; a flush puts them into the file. With ``private=1`` it has no multi-conn, and
a flush on one connection puts down only what that connection wrote. So a copy that takes a write
for durable before its flush, or after a flush elsewhere, loses bytes.

    nbdkit python tests/fault/forgetting.py file=DISK [private=1]
"""

from __future__ import annotations

import os

API_VERSION = 2

Dirty = list[tuple[int, int]]

_settings = {"file": "", "private": "0"}
_memory = bytearray()
_everything: Dirty = []


def config(key: str, value: str) -> None:
    """Take a parameter."""
    _settings[key] = value


def get_ready() -> None:
    """Read what an earlier life has flushed."""
    fd = os.open(_settings["file"], os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        _memory[:] = file.read()


def open(readonly: bool) -> Dirty:
    """Return the ranges that this connection flushes."""
    return [] if _settings["private"] == "1" else _everything


def can_multi_conn(dirty: Dirty) -> bool:
    """Whether a flush is for all connections."""
    return dirty is _everything


def get_size(dirty: Dirty) -> int:
    """Return the size in bytes."""
    return len(_memory)


def pread(dirty: Dirty, buffer: bytearray, offset: int, flags: int) -> None:
    """Read from memory."""
    buffer[:] = _memory[offset : offset + len(buffer)]


def pwrite(dirty: Dirty, buffer: bytearray, offset: int, flags: int) -> None:
    """Write to memory only."""
    _memory[offset : offset + len(buffer)] = buffer
    dirty.append((offset, len(buffer)))


def zero(dirty: Dirty, count: int, offset: int, flags: int) -> None:
    """Make zeroes in memory only."""
    _memory[offset : offset + count] = bytes(count)
    dirty.append((offset, count))


def flush(dirty: Dirty, flags: int) -> None:
    """Put down what has been written."""
    fd = os.open(_settings["file"], os.O_WRONLY)
    try:
        for offset, length in dirty:
            os.pwrite(fd, memoryview(_memory)[offset : offset + length], offset)
    finally:
        os.close(fd)
    dirty.clear()
