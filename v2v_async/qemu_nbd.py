"""qemu-nbd: the command lines that serve a disk of any format qemu knows."""

from __future__ import annotations

from pathlib import Path

from v2v_async.process import ServerCommand

CLUSTER_SIZE = 64 * 1024
"""qcow2's default; compressed images want writes of whole clusters."""


def serve_overlay(overlay: Path, socket: Path) -> ServerCommand:
    """Serve a qcow2 overlay, writable; ``qemu:allocation-depth`` tells what was changed in it."""
    argv = _base(socket) + ["--allocation-depth", "--format=qcow2", "--discard=unmap", str(overlay)]
    return ServerCommand("qemu-nbd", tuple(argv), socket)


def serve_image(path: Path, format_: str, socket: Path) -> ServerCommand:
    """Serve an image or a block device, writable. It holds qemu's locks of the image meanwhile."""
    argv = _base(socket) + [f"--format={format_}", "--discard=unmap", str(path)]
    return ServerCommand("qemu-nbd", tuple(argv), socket)


def serve_read_only(
    name: str, format_: str, socket: Path, *, bitmap: str | None = None
) -> ServerCommand:
    """Serve an image, read-only; ``name`` may be a ``json:`` description, which has its format.

    ``qemu:dirty-bitmap:BITMAP`` tells what is set in its ``bitmap``.
    """
    format_option = [] if name.startswith("json:") else [f"--format={format_}"]
    bitmap_option = [] if bitmap is None else [f"--bitmap={bitmap}"]
    argv = _base(socket) + ["--read-only", *bitmap_option, *format_option, name]
    return ServerCommand("qemu-nbd", tuple(argv), socket)


def serve_target(path: Path, socket: Path, *, compress: bool = False) -> ServerCommand:
    """Serve a qcow2 target, writable. ``compress``: whole clusters are compressed on writing."""
    if compress:
        image = (
            "driver=compress,file.driver=qcow2,file.file.driver=file,"
            f"file.file.filename={escape_option(str(path))}"
        )
        argv = _base(socket) + ["--discard=unmap", "--image-opts", image]
    else:
        argv = _base(socket) + ["--discard=unmap", "--format=qcow2", str(path)]
    return ServerCommand("qemu-nbd", tuple(argv), socket)


def escape_option(value: str) -> str:
    """Double the commas, as qemu's option syntax wants it."""
    return value.replace(",", ",,")


def _base(socket: Path) -> list[str]:
    # --shared=0: as many clients as come; --persistent: stay when the last one has gone.
    # Writeback: the copy ends with a flush, so fsync for each write would only cost time.
    return ["qemu-nbd", "--persistent", "--shared=0", "--cache=writeback", f"--socket={socket}"]
