"""Real servers for tests: disks of awkward content served by nbdkit and qemu-nbd."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

from v2v_async import nbdkit, qemu_nbd
from v2v_async.server import Server, Servers

MIB = 1 << 20


def fragmented(path: Path, size: int, *, seed: int = 1) -> Path:
    """Write a raw sparse disk: data of odd lengths at odd places, zeroes in it, an odd end."""
    noise = random.Random(seed)
    with path.open("wb") as disk:
        disk.truncate(size)
        for _ in range(40):
            disk.seek(noise.randrange(size))
            length = min(noise.choice([1, 500, 4096, 65536, 300_000]), size - disk.tell())
            disk.write(noise.randbytes(length))
        disk.seek(size // 3)
        disk.write(bytes(min(200_000, size - size // 3)))  # allocated zeroes
        disk.seek(size - 1)
        disk.write(b"!")
    return path


def digest(path: Path, image_format: str = "raw") -> str:
    """Return the SHA-256 of a disk's content, whatever its format."""
    if image_format == "raw":
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    raw = path.with_suffix(".as-raw")
    subprocess.run(
        ["qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", str(path), str(raw)],
        check=True,
    )
    try:
        return digest(raw)
    finally:
        raw.unlink()


async def serve(
    servers: Servers,
    name: str,
    folder: Path,
    plugin: str,
    *parameters: str,
    filters: tuple[str, ...] = (),
    read_only: bool = False,
) -> Server:
    """Serve an nbdkit plugin on ``folder/name``."""
    features = await nbdkit.probe()
    command = nbdkit.serve(
        features, folder / name, plugin, parameters, filters=filters, read_only=read_only
    )
    return await servers.start(name, command, log=folder / f"{name}.log")


async def serve_qcow2(servers: Servers, name: str, folder: Path, path: Path) -> Server:
    """Serve a qcow2 image, writable, by qemu-nbd."""
    command = qemu_nbd.serve_target(path, folder / name)
    return await servers.start(name, command, log=folder / f"{name}.log")
