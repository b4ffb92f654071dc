"""What a disk image from elsewhere is, told from its first and last bytes before qemu opens it.

qemu opens what an image names: a VMDK descriptor's extents, a qcow2's data file, backing files. In
an image from a stranger that may be ``/etc/shadow``, and in one of another host it is a file of
*that* host, which qemu would look for here. So the format is found out here, it is told to qemu
(which then probes nothing), and an image that names others is refused, but for a descriptor whose
extents lie beside it.

Sources: the VMDK specification 5.0 (VMware), docs/interop/qcow2.rst of qemu, the VHD specification
(Microsoft), block/vmdk.c of qemu for what is opened when.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from v2v_async.errors import SourceError
from v2v_async.input.vmdk_descriptor import (
    DEVICES,
    PARENT_HINT,
    WHERE_QEMU_LOOKS,
    Extent,
    embedded_range,
    is_descriptor,
    parse_descriptor,
)
from v2v_async.qemu_img import SECTOR

HEAD = 1 << 18
"""Bytes that are wanted of an image's beginning: headers, and a descriptor (at most 10 KiB)."""
TAIL = 512
"""Bytes that are wanted of its end: a VHD's footer."""

_MAGIC = (
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"conectix", "vpc"),
)
_PARENT = re.compile(PARENT_HINT + rb'\s*=?\s*"?([^"\r\n]*)')  # but for the name, only shown
_VDI_MAGIC = b"\x7f\x10\xda\xbe"  # at 64
_VHD_FIXED, _VHD_DYNAMIC = 2, 3
_QCOW2_DATA_FILE = 1 << 2
_QED_BACKING = 1 << 0


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """``size`` is the virtual size in bytes, None where the header does not tell it.

    ``extents``: those of a VMDK descriptor that have a file, which lies beside it.
    """

    format: str
    size: int | None = None
    extents: tuple[Extent, ...] = ()


def read_header(head: bytes, tail: bytes, size: int, what: str) -> ImageHeader:
    """Return what an image of ``size`` bytes is that begins and ends so.

    Raises:
        SourceError: it is damaged, or names other files that it must not name.
    """
    found = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    try:
        if found == "qcow2":
            return _qcow2(head, what)
        if found == "vmdk":
            return _vmdk(head, what)
        if found == "qed":
            return _qed(head, what)
        if found == "vpc" or tail.startswith(b"conectix"):
            return _vpc(head if found == "vpc" else tail, what)
        if found is not None:
            return ImageHeader(found)
        if head[64:68] == _VDI_MAGIC:
            return _vdi(head, what)
    except struct.error as error:
        raise SourceError(f"{what} ends within its header: it is damaged") from error
    if is_descriptor(head):
        return _descriptor(head, size, what)
    if head.startswith(b"QFI"):
        raise SourceError(f"{what} is damaged: its header is neither qcow2's nor any other's")
    return ImageHeader("raw", size)


def _qcow2(head: bytes, what: str) -> ImageHeader:
    version, backing = struct.unpack_from(">IQ", head, 4)
    (virtual_size,) = struct.unpack_from(">Q", head, 24)
    if version not in (2, 3):
        raise SourceError(
            f"{what} is qcow of version {version}, which is not supported",
            hint="convert it: qemu-img convert -O qcow2",
        )
    if backing:
        raise _names_another(what, "a backing file")
    if version == 3 and struct.unpack_from(">Q", head, 72)[0] & _QCOW2_DATA_FILE:
        raise _names_another(what, "an external data file")
    if struct.unpack_from(">I", head, 32)[0]:
        raise SourceError(f"{what} is an encrypted qcow2, which is not supported here")
    return ImageHeader("qcow2", virtual_size)


def _qed(head: bytes, what: str) -> ImageHeader:
    features, _, _, _, virtual_size = struct.unpack_from("<5Q", head, 16)
    if features & _QED_BACKING:
        raise _names_another(what, "a backing file")
    return ImageHeader("qed", virtual_size)


def _vpc(footer: bytes, what: str) -> ImageHeader:
    (virtual_size,) = struct.unpack_from(">Q", footer, 48)
    (kind,) = struct.unpack_from(">I", footer, 60)
    if kind not in (_VHD_FIXED, _VHD_DYNAMIC):
        raise _names_another(what, "a parent (it is a differencing VHD)")
    return ImageHeader("vpc", virtual_size)


def _vdi(head: bytes, what: str) -> ImageHeader:
    (kind,) = struct.unpack_from("<I", head, 76)
    (virtual_size,) = struct.unpack_from("<Q", head, 368)
    if kind not in (1, 2):
        raise _names_another(what, "a parent (it is a differencing VDI)")
    return ImageHeader("vdi", virtual_size)


def _vmdk(head: bytes, what: str) -> ImageHeader:
    if head.startswith(b"COWD"):
        (sectors,) = struct.unpack_from("<I", head, 12)
        _refuse_parent(head, what)
        return ImageHeader("vmdk", sectors * SECTOR)
    (sectors,) = struct.unpack_from("<Q", head, 12)
    if not sectors:
        # qemu would take the descriptor's word for where the content is.
        raise _names_another(what, "other files (it is only a descriptor)")
    if sectors >= 1 << 54:
        raise SourceError(f"{what} is damaged: its size is absurd")
    try:
        place = embedded_range(head)
    except SourceError as error:
        raise SourceError(f"{what} is damaged: {error.message}") from error
    # A descriptor is longer than the header may say to the one, shorter to the other.
    for start, length in (place or WHERE_QEMU_LOOKS, WHERE_QEMU_LOOKS):
        _refuse_parent(head[start : start + max(length, WHERE_QEMU_LOOKS[1])], what)
    return ImageHeader("vmdk", sectors * SECTOR)


def _descriptor(head: bytes, size: int, what: str) -> ImageHeader:
    if size > len(head):
        raise SourceError(f"{what} is a VMDK descriptor of {size} bytes, which is absurd")
    _refuse_parent(head, what)
    try:
        descriptor = parse_descriptor(head)
    except SourceError as error:
        raise SourceError(
            f"{what} is refused: {error.message}",
            hint="only extents that lie beside their descriptor are allowed",
        ) from error
    for extent in descriptor.extents:
        if extent.type in DEVICES:
            raise SourceError(
                f"{what} is a VMDK descriptor with an extent of type {extent.type}, which is "
                "refused",
                hint="it stands for a device; export the guest as OVA again",
            )
    extents = tuple(extent for extent in descriptor.extents if extent.file_name is not None)
    if not extents:
        raise SourceError(f"{what} is a VMDK descriptor that names no content")
    sectors = sum(extent.sectors for extent in descriptor.extents)
    return ImageHeader("vmdk", sectors * SECTOR, extents)


def _refuse_parent(content: bytes, what: str) -> None:
    """Refuse a descriptor in which the word stands at all: nobody else need understand it."""
    found = _PARENT.search(content)
    if found is not None:
        raise _names_another(what, f"a parent, ‘{found[1].decode('utf-8', 'replace')[:200]}’")


def _names_another(what: str, other: str) -> SourceError:
    return SourceError(
        f"{what} names {other}: refused, since it may be any file of this machine",
        hint="make one whole image of it where it is from: consolidate its snapshots, or use "
        "qemu-img convert",
    )
