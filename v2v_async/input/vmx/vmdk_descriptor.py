"""VMDK descriptors: which files a disk is made of. Pure.

::

    guest.vmdk (text) ──┬─ extent ──> guest-flat.vmdk     the bytes of the disk (ESXi)
                        └─ parent ──> base.vmdk           a snapshot's: what it changes

The descriptor of a sparse image is inside it. qemu opens whatever a descriptor names, any file and
any protocol, so a descriptor is read here *before* qemu gets it, and what could be understood in
two ways is refused.
Source: VMware's "Virtual Disk Format 1.1"; qemu's block/vmdk.c for what it accepts.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from v2v_async.errors import SourceError

MAX_SIZE = 1024 * 1024
"""Bytes; qemu takes no more of a descriptor either."""
SECTOR = 512
NO_PARENT = "ffffffff"
SPARSE_MAGIC = b"KDMV"
DELTA_MAGICS = (b"COWD", b"\xbe\xba\xfe\xca\x00\x00\x00\x00")
"""The extents of snapshots on ESXi: vmfsSparse and seSparse."""

_DESCRIPTOR_LINE = re.compile(rb"\s*#\s*Disk DescriptorFile", re.IGNORECASE)
_EXTENT_START = re.compile(r"\s*(RW|RDONLY|NOACCESS)\b")
_EXTENT = re.compile(
    r"\s*(RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,15})[ \t]+([A-Za-z]+)"
    r'(?:[ \t]+"([^"\r\n]+)"(?:[ \t]+([0-9]{1,15}))?(?:[ \t]+[^"\r\n]*)?)?\s*'
)
_FIELD = re.compile(r'^\s*(CID|parentCID|createType)\s*=\s*"?([^"\r\n]*?)"?\s*$', re.MULTILINE)
_HINT = re.compile(r'parentFileNameHint="([^"\r\n]+)"')
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
        return self.type in ("FLAT", "VMFS")


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
            raise SourceError(f"the VMDK descriptor has an extent that makes no sense: {line!r}")
        _, sectors, kind, name, offset = found.groups()
        if name is not None:
            _refuse_odd(name, "extent")
            if "/" in name or name in (".", ".."):
                raise SourceError(
                    f"the VMDK descriptor names an extent in another folder: ‘{_clean(name)}’",
                    hint="extents are beside their descriptor; if this is right, put them there",
                )
        extents.append(Extent(int(sectors), kind.upper(), name, int(offset or 0)))
    return Descriptor(create_type, _parent(text, fields), extents)


def _parent(text: str, fields: dict[str, str]) -> str | None:
    # qemu takes the first place where the word stands, a comment too, and whatever parentCID says.
    at = text.find("parentFileNameHint")
    if at == -1:
        if fields.get("parentCID", NO_PARENT).lower() not in (NO_PARENT, "-1"):
            raise SourceError("the VMDK is a snapshot, and its descriptor does not name its parent")
        return None
    match = _HINT.match(text, at)
    if match is None:
        raise SourceError("the VMDK descriptor has a parentFileNameHint that makes no sense")
    _refuse_odd(match[1], "parent")
    return match[1]


def _refuse_odd(name: str, what: str) -> None:
    # qemu takes what stands before a colon for a protocol: json:, nbd:, fd: …
    if ":" in name.partition("/")[0] or any(ord(c) < 32 for c in name):
        raise SourceError(
            f"the VMDK descriptor names a {what} that is not a file: ‘{_clean(name)}’",
            hint="a file whose name has a colon must be renamed, and the descriptor corrected",
        )


def _clean(name: str) -> str:
    return name.encode(errors="replace").decode()[:200]
