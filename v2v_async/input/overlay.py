"""Overlays: what keeps the source from being written.

::

    virt-v2v-in-place ── writes ──> overlay ── reads ──> source disk

Two kinds, behind one small interface:

``cow``    nbdkit's cow filter. Nothing to prepare; the overlay is an unlinked file that goes with
           its server. For raw files, block devices and NBD exports.
``qcow2``  a qcow2 file in the v2v directory, served by qemu-nbd. It outlives its server, and its
           ``qemu:allocation-depth`` tells what conversion changed. For every format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from v2v_async import nbdkit, qemu_img, qemu_nbd
from v2v_async.errors import UsageError
from v2v_async.process import ServerCommand

OverlayKind = Literal["cow", "qcow2"]


@dataclass(frozen=True, slots=True)
class DiskSource:
    """A disk to be read: ``location`` is an absolute path, or an NBD URI where ``is_uri``.

    ``size`` is its virtual size in bytes.
    """

    location: str
    format: str
    is_uri: bool
    size: int


class Overlay(Protocol):
    """Makes an overlay and says how to serve it."""

    async def prepare(
        self, source: DiskSource, index: int, socket: Path, scratch: Path
    ) -> ServerCommand:
        """Return the server that exports an overlay on ``source``; its file is in ``scratch``."""
        ...


class CowOverlay:
    """nbdkit's cow filter."""

    async def prepare(
        self, source: DiskSource, index: int, socket: Path, scratch: Path
    ) -> ServerCommand:
        """See :class:`Overlay`."""
        features = await nbdkit.probe()
        if source.is_uri:
            return nbdkit.serve_source_uri(features, source.location, socket, scratch)
        return nbdkit.serve_source_file(features, Path(source.location), socket, scratch)


class Qcow2Overlay:
    """A qcow2 file over the source."""

    async def prepare(
        self, source: DiskSource, index: int, socket: Path, scratch: Path
    ) -> ServerCommand:
        """See :class:`Overlay`."""
        overlay = scratch / f"overlay-{index}.qcow2"
        backing = (source.location, source.format)
        await qemu_img.create_qcow2(overlay, source.size, backing=backing)
        return qemu_nbd.serve_overlay(overlay, socket)


def choose(wanted: OverlayKind | None, source: DiskSource) -> Overlay:
    """Return the overlay for a disk: the wanted kind, else the plain one that can serve it.

    Raises:
        UsageError: the wanted kind can't serve it.
    """
    is_raw = source.format == "raw"
    if wanted == "cow" and not is_raw:
        raise UsageError(
            f"‘-io overlay=cow’ can't serve ‘{source.location}’, which is {source.format}",
            hint="leave the option out, or use overlay=qcow2",
        )
    if wanted == "qcow2" and source.location.startswith("nbds"):
        raise UsageError(
            "‘-io overlay=qcow2’ can't be used with TLS (nbds://)", hint="use overlay=cow"
        )
    return CowOverlay() if is_raw and wanted != "qcow2" else Qcow2Overlay()
