"""Where the bytes of a source disk are, and how nbdkit and qemu name that place.

::

    FileImage    a local file or block device, or a part of one (a disk inside a tar file)
    NbdImage     an NBD server's export
    PluginImage  whatever an nbdkit plugin reads: curl, ssh, vddk
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

Retry: TypeAlias = Mapping[str, tuple[str, ...]]
"""Filters that try again what a plugin failed at, ordered from the client to the plugin, and their
parameters."""

RETRY: Retry = MappingProxyType({"retry": ("retries=5", "retry-delay=2", "retry-exponential=yes")})
"""The disk is opened anew, and what went away must be back within a minute (2 + 4 + 8 + 16 + 32 s).
The copy then tries again itself."""
NEVER: Retry = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FileImage:
    """A local file or block device; only ``length`` bytes from ``offset`` where given."""

    path: Path
    offset: int = 0
    length: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether it is only a part of the file."""
        return self.length is not None

    @property
    def shown(self) -> str:
        """It, for people."""
        return str(self.path)


@dataclass(frozen=True, slots=True)
class NbdImage:
    """An NBD server's export. ``uri`` may hold a user name; NBD URIs have no passwords."""

    uri: str

    @property
    def shown(self) -> str:
        """It, for people."""
        return self.uri


@dataclass(frozen=True, slots=True)
class PluginImage:
    """What an nbdkit plugin reads. No parameter may hold a secret: argv is everybody's to read.

    ``filters`` are ordered from the client to the plugin and stand behind the cow filter;
    ``parameters`` are the plugin's and theirs. ``retry`` comes behind them all, as far as this
    nbdkit has it: it is not needed to read a disk. ``shown`` is what people see.
    """

    plugin: str
    parameters: tuple[str, ...]
    shown: str
    filters: tuple[str, ...] = ()
    retry: Retry = field(default_factory=lambda: NEVER)
    environment: Mapping[str, str] = field(default_factory=dict)


Image: TypeAlias = FileImage | NbdImage | PluginImage


@dataclass(frozen=True, slots=True)
class DiskSource:
    """A disk to be read: its place, its format as qemu names it, its virtual size in bytes.

    ``size`` is 0 where only the server will tell it.
    """

    image: Image
    format: str
    size: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether each request may have far to go."""
        return not isinstance(self.image, FileImage)


def backing_name(source: DiskSource, served_at: Path | None = None) -> str:
    """Return what qemu-img's ``-b`` takes for a disk; ``served_at``: the socket that exports it.

    A part of a file is described to qemu as a raw file under the format's driver: neither is
    unpacked nor copied.
    Source: qemu-block-drivers(7); the ``json:`` pseudo-protocol.
    """
    if served_at is not None:
        return "json:" + json.dumps(
            {"driver": source.format, "file": {"driver": "nbd", "path": str(served_at)}}
        )
    image = source.image
    if isinstance(image, NbdImage):
        return image.uri
    assert isinstance(image, FileImage), "an nbdkit plugin must be served first"
    if not image.is_part:
        return str(image.path.absolute())
    part = {
        "driver": "raw",
        "offset": image.offset,
        "size": image.length,
        "file": {"driver": "file", "filename": str(image.path.absolute())},
    }
    described = part if source.format == "raw" else {"driver": source.format, "file": part}
    return "json:" + json.dumps(described)
