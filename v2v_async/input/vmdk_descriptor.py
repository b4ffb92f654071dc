"""VMDK descriptors: which files a disk is made of. Pure.

::

    guest.vmdk (text) ──┬─ extent ──> guest-flat.vmdk     the bytes of the disk (ESXi)
                        └─ parent ──> base.vmdk           a snapshot's: what it changes

The descriptor of a sparse image is inside it, where the header says; qemu looks for the name of a
parent right behind the header, whatever that says. qemu opens whatever a descriptor names, any file
and any protocol, so a descriptor is read here *before* qemu gets it, and what could be understood
in two ways is refused.
Source: VMware's "Virtual Disk Format 1.1"; qemu's block/vmdk.c for what it accepts.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from v2v_async.errors import SourceError
from v2v_async.qemu_img import SECTOR

MAX_SIZE = 1024 * 1024
"""Bytes; qemu takes no more of a descriptor either."""
WHERE_QEMU_LOOKS = (SECTOR, 20 * SECTOR)
"""(offset, length) in bytes of what qemu takes for the descriptor in a sparse image."""
PARENT_HINT = b"parentFileNameHint"
NO_PARENT = "ffffffff"
SPARSE_MAGIC = b"KDMV"
DELTA_MAGICS = (b"COWD", b"\xbe\xba\xfe\xca\x00\x00\x00\x00")
"""The extents of snapshots on ESXi: vmfsSparse and seSparse."""

_DESCRIPTOR_LINE = re.compile(rb"\s*#\s*Disk DescriptorFile", re.IGNORECASE)
# FLAT and VMFS hold the very bytes; the last four are devices of an ESXi host. qemu takes a line of
# any other type for no extent at all, so that the disk would be shorter than its maker meant.
_FLAT = ("FLAT", "VMFS")
_SPARSE = ("SPARSE", "VMFSSPARSE", "SESPARSE")
_NO_FILE = "ZERO"
DEVICES = ("VMFSRDM", "VMFSRAW", "VMFSRAWDEVICEMAP", "VMFSPASSTHROUGHRAWDEVICEMAP")
_TYPES = (*_FLAT, *_SPARSE, _NO_FILE, *DEVICES)

_EXTENT_START = re.compile(r"\s*(RW|RDONLY|NOACCESS)\b")
_EXTENT = re.compile(
    r"\s*(RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,15})[ \t]+([A-Za-z]+)"
    r'(?:[ \t]+"([^"\r\n]+)"(?:[ \t]+([0-9]{1,15}))?(?:[ \t]+[^"\r\n]*)?)?\s*'
)
_FIELD = re.compile(r'^\s*(CID|parentCID|createType)\s*=\s*"?([^"\r\n]*?)"?\s*$', re.MULTILINE)
_HINT = re.compile(PARENT_HINT + rb'="([^"\r\n\0]+)"')
# Of the sparse header: magic, version, flags, capacity, grain size, descriptor offset and size; in
# sectors.
_HEADER = struct.Struct("<4sIIQQQQ")


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a disk; ``sectors`` and ``offset`` (into the file) count 512 bytes."""

    sectors: int
    type: str
    file_name: str | None = None
    offset: int = 0

    @property
    def is_flat(self) -> bool:
        """Whether the file holds the very bytes."""
        return self.type in _FLAT

    @property
    def is_sparse(self) -> bool:
        """Whether the file has a header of its own."""
        return self.type in _SPARSE


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says. ``parent``: the file that this disk is a snapshot over."""

    create_type: str
    parent: str | None = None
    extents: list[Extent] = field(default_factory=list)


def is_descriptor(head: bytes) -> bool:
    """Whether a file that begins so is a descriptor."""
    return _DESCRIPTOR_LINE.match(head) is not None


def embedded_range(head: bytes) -> tuple[int, int] | None:
    """Return (offset, length) in bytes of the descriptor in a sparse image; None without one.

    Raises:
        SourceError: the image's header is broken.
    """
    if len(head) < _HEADER.size:
        raise SourceError("the header of the VMDK is cut off")
    _, _, _, _, _, offset, size = _HEADER.unpack_from(head)
    if offset == 0 or size == 0:
        return None
    if size * SECTOR > MAX_SIZE:
        raise SourceError("the descriptor in the VMDK is larger than a descriptor can be")
    return offset * SECTOR, size * SECTOR


def parse_descriptor(content: bytes) -> Descriptor:
    """Read a descriptor.

    Raises:
        SourceError: it is not one, or could be read in two ways.
    """
    if len(content) > MAX_SIZE:
        raise SourceError("the VMDK descriptor is larger than a descriptor can be")
    text = content.split(b"\0")[0].decode("utf-8", "surrogateescape")
    fields: dict[str, str] = {}
    for match in _FIELD.finditer(text):
        fields.setdefault(match[1], match[2])
    create_type = fields.get("createType", "")
    if not create_type:
        raise SourceError("it is not a VMDK descriptor (it has no createType)")
    extents = []
    for line in text.split("\n"):
        if not _EXTENT_START.match(line):
            continue
        found = _EXTENT.fullmatch(line)
        if found is None:
            raise SourceError(
                f"the VMDK descriptor has an extent that makes no sense: {line[:200]!r}"
            )
        _, sectors, kind, name, offset = found.groups()
        if kind not in _TYPES:
            raise SourceError(
                f"the VMDK descriptor has an extent of the type {kind[:30]}, which is not known"
            )
        # Without a name in its line, qemu takes the next line's.
        if name is None and kind != _NO_FILE:
            raise SourceError(f"the VMDK descriptor has an extent without a file: {line[:200]!r}")
        if name is not None:
            _refuse_odd(name, "an extent")
            if "/" in name or "\\" in name or name in (".", ".."):
                raise SourceError(
                    f"the VMDK descriptor names an extent in another folder: ‘{_clean(name)}’",
                    hint="extents are beside their descriptor; if this is right, put them there",
                )
        extents.append(Extent(int(sectors), kind, name, int(offset or 0)))
    parent = named_parent(content)
    if parent is None and fields.get("parentCID", NO_PARENT).lower() not in (NO_PARENT, "-1"):
        raise SourceError("the VMDK is a snapshot, and its descriptor does not name its parent")
    return Descriptor(create_type, parent, extents)


def parse_embedded(content: bytes, where_qemu_looks: bytes) -> Descriptor | None:
    """Read the descriptor in a sparse image; None without one.

    ``content`` is what lies in :func:`embedded_range`, the other what lies in
    :data:`WHERE_QEMU_LOOKS`.

    Raises:
        SourceError: it could be read in two ways.
    """
    descriptor = parse_descriptor(content) if content.strip(b"\0") else None
    parent = None if descriptor is None else descriptor.parent
    if named_parent(where_qemu_looks) != parent:
        raise SourceError("the VMDK names one parent where its header points, and another to qemu")
    return descriptor


def named_parent(content: bytes) -> str | None:
    """Return the parent that a descriptor names, as it stands there.

    Raises:
        SourceError: it could be understood in two ways.
    """
    # qemu takes the first place where the word stands, a comment too, and whatever parentCID says;
    # it reads no further than a NUL, as others may.
    at = content.find(PARENT_HINT)
    if at == -1:
        return None
    match = _HINT.match(content, at)
    if match is None or b"\0" in content[:at]:
        raise SourceError("the VMDK descriptor has a parentFileNameHint that makes no sense")
    name = match[1].decode("utf-8", "surrogateescape")
    _refuse_odd(name, "a parent")
    return name


def _refuse_odd(name: str, what: str) -> None:
    # qemu takes what stands before a colon for a protocol: json:, nbd:, fd: …
    if ":" in name.partition("/")[0] or any(ord(c) < 32 for c in name):
        raise SourceError(
            f"the VMDK descriptor names {what} that is not a file: ‘{_clean(name)}’",
            hint="a file whose name has a colon must be renamed, and the descriptor corrected",
        )
    if any("\udc80" <= c <= "\udcff" for c in name):
        raise SourceError(
            f"the VMDK descriptor names {what} whose name is not UTF-8: ‘{_clean(name)}’",
            hint="rename the file, and correct the descriptor",
        )


def _clean(name: str) -> str:
    return name.encode(errors="replace").decode()[:200]
