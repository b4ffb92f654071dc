"""Real block devices for tests: loop devices, which need root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """Have the file as a block device, or skip the test where that needs more rights."""
    argv = ["losetup", *options, "--find", "--show", str(path)]
    made = subprocess.run(argv, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def filled(path: Path, size: int, byte: bytes = b"\xaa") -> Path:
    """Make a file in which nothing is zero."""
    path.write_bytes(byte * size)
    return path
