"""Local VMDK disks: every file that one is made of, looked at before qemu opens it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from v2v_async.errors import SourceError
from v2v_async.input import vmdk_descriptor
from v2v_async.input.checking import CheckedDisk, check_file
from v2v_async.input.vmdk_descriptor import (
    DELTA_MAGICS,
    DEVICES,
    SPARSE_MAGIC,
    WHERE_QEMU_LOOKS,
    Descriptor,
    Extent,
    embedded_range,
    is_descriptor,
    parse_descriptor,
    parse_embedded,
)
from v2v_async.qemu_img import SECTOR

_MOST_IMAGES = 64
"""VMware allows 32 snapshots in a chain; this ends one that goes round."""
_HEAD = 512


@dataclass(frozen=True, slots=True)
class _Image:
    """A VMDK file; ``descriptor`` None where a sparse image has none inside."""

    path: Path
    descriptor: Descriptor | None
    is_sparse: bool


async def check_vmdk(path: Path) -> CheckedDisk:
    """Look at a local VMDK with all its extents and parents.

    Raises:
        SourceError: it can't be used; the message names the disk and the file.
    """
    try:
        files = _files(path)
    except SourceError as error:
        raise SourceError(
            f"the disk ‘{path}’ can't be read: {error.message}", hint=error.hint
        ) from error
    checked = await check_file(path, "vmdk")
    others = [file for file in checked.files if file not in files]
    return replace(checked, files=(*files, *others))


def _files(path: Path) -> tuple[str, ...]:
    """Return the files of a chain: a disk, its extents, its parent and so on."""
    found: list[str] = []
    for _ in range(_MOST_IMAGES):
        image = _image(path)
        found.append(str(path.absolute()))
        descriptor = image.descriptor
        if descriptor is None:
            return tuple(found)
        if not image.is_sparse:
            found += [str(file.absolute()) for file in _extents(path, descriptor.extents)]
        if descriptor.parent is None:
            return tuple(found)
        path = path.parent / descriptor.parent
    raise SourceError(f"its chain of snapshots has more than {_MOST_IMAGES} images, or goes round")


def _image(path: Path) -> _Image:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SourceError(f"‘{path}’ is not a file")
        with path.open("rb") as file:
            head = file.read(_HEAD)
            if is_descriptor(head):
                content = head + file.read(vmdk_descriptor.MAX_SIZE)
                return _Image(path, parse_descriptor(content), False)
            if head.startswith(SPARSE_MAGIC):
                place = embedded_range(head) or (0, 0)
                contents = [_read(file, *at) for at in (place, WHERE_QEMU_LOOKS)]
            else:
                raise SourceError(
                    f"‘{path}’ is not a VMDK" + _what_else(head, path),
                    hint="the VMX file must name the descriptor; a raw disk alone is read with "
                    "-i disk",
                )
    except OSError as error:
        raise SourceError(
            f"‘{path}’: {error.strerror}",
            hint="a disk is looked for in the folder of its VMX file, a snapshot's parent in the "
            "folder of the snapshot"
            if isinstance(error, FileNotFoundError)
            else "check its mode",
        ) from error
    # qemu opens the extents of a descriptor that is inside a sparse file where the header says
    # that the file itself holds nothing.
    has_capacity = any(head[12:20])
    return _Image(path, parse_embedded(*contents), has_capacity)


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _extents(path: Path, extents: list[Extent]) -> list[Path]:
    """Check that extents are there, whole, and in the folder of their descriptor."""
    if not extents:
        raise SourceError(f"the descriptor ‘{path}’ names no extent")
    folder = path.parent.resolve()
    files = []
    for extent in extents:
        if extent.type in DEVICES:
            raise SourceError(
                f"‘{path}’ is mapped to a device of its ESXi host (RDM), which is not here",
                hint="convert the mapping to a disk in VMware, or use -it vddk",
            )
        if extent.file_name is None:
            continue  # ZERO: a part without a file
        file = path.parent / extent.file_name
        try:
            size = file.stat().st_size
            mode = file.stat().st_mode
        except OSError as error:
            raise SourceError(
                f"its extent ‘{file}’: {error.strerror}",
                hint="copy all files of the disk, not the descriptor alone",
            ) from error
        if os.path.realpath(file) != str(folder / extent.file_name):
            raise SourceError(
                f"its extent ‘{file}’ is a link to ‘{os.path.realpath(file)}’",
                hint="extents are beside their descriptor; if this is right, put them there",
            )
        needed = (extent.offset + extent.sectors) * SECTOR
        if extent.is_flat and stat.S_ISREG(mode) and size < needed:
            raise SourceError(
                f"its extent ‘{file}’ has {size} bytes of {needed}", hint="copy it again, whole"
            )
        files.append(file)
    return files


def _what_else(head: bytes, path: Path) -> str:
    if any(head.startswith(magic) for magic in DELTA_MAGICS):
        return ", but an extent of a snapshot: name the disk by its descriptor"
    name = path.name
    if name.endswith("-flat.vmdk"):
        return f", but the bytes of one: its descriptor is ‘{name.removesuffix('-flat.vmdk')}.vmdk’"
    return ""
