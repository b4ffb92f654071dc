"""``-i disk`` (``-i local`` is the same): disk images, block devices and NBD exports.

Each argument is a file, a block device or an NBD URI (``nbd://``, ``nbd+unix://``, ``nbds://``);
together they are the disks of one guest, in order. There is no metadata: name, memory and the
like are what virt-v2v assumes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Self

from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.input.checking import (
    CheckedDisk,
    check_each,
    check_file,
    check_uri,
    image_format,
    with_sizes,
)
from v2v_async.input.contract import Input
from v2v_async.input.naming import DISK_SUFFIXES, name_after
from v2v_async.input.overlay import (
    OVERLAY_HELP,
    OverlayKind,
    choose,
    overlay_option,
    serve_overlays,
)
from v2v_async.model import Nic, SourceGuest
from v2v_async.options import InputOptions
from v2v_async.redact import redact
from v2v_async.server import Servers
from v2v_async.units import GIB
from v2v_async.v2vdir import V2VDir

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://", re.IGNORECASE)

# What virt-v2v's disk input assumes: the file says nothing about the machine.
_MEMORY = 2 * GIB
_VCPUS = 1
_FEATURES = ["acpi", "apic", "pae"]


@dataclass(frozen=True, slots=True)
class _Disk:
    """An argument; ``format`` None: to be found out."""

    argument: str
    is_uri: bool
    format: str | None


class DiskInput(Input):
    """One guest made of the disks named on the command line."""

    name: ClassVar[str] = "disk"
    option_help: ClassVar[dict[str, str]] = {"overlay": OVERLAY_HELP}

    def __init__(self, disks: list[_Disk], overlay: OverlayKind | None) -> None:
        self._disks = disks
        self._overlay: OverlayKind | None = overlay
        self._checked: list[CheckedDisk] = []

    @classmethod
    def parse(cls, options: InputOptions) -> Self:
        """See :class:`Input`."""
        if not options.arguments:
            raise UsageError(
                "-i disk: no disk was named",
                hint="name one or more disk images, block devices or NBD URIs, the system disk "
                "first",
            )
        if options.transport is not None:
            raise UsageError(f"‘-it {options.transport}’ has no meaning with ‘-i disk’")
        overlay = overlay_option("-i disk", cls.option_help, options)
        format_ = image_format(options)
        disks = []
        for argument in options.arguments:
            is_uri = _URI.match(argument) is not None
            if not is_uri and re.match(r"[a-z][a-z0-9+.-]*://", argument):
                raise UsageError(
                    f"‘{redact(argument)}’ is not a kind of URI that -i disk reads",
                    hint="it reads files, block devices, nbd://, nbd+unix:// and nbds://",
                )
            if is_uri and format_ not in (None, "raw"):
                raise UsageError(
                    f"‘-if {options.format}’: an NBD export is raw; serve the image with "
                    "qemu-nbd, which reads its format"
                )
            disks.append(_Disk(argument, is_uri, "raw" if is_uri else format_))
        seen: set[str] = set()
        for disk in disks:
            key = disk.argument if disk.is_uri else os.path.realpath(disk.argument)
            if key in seen:
                raise UsageError(f"the disk ‘{redact(disk.argument)}’ was named twice")
            seen.add(key)
        return cls(disks, overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        self._checked = await check_each([partial(self._look, disk) for disk in self._disks])

    async def _look(self, disk: _Disk) -> CheckedDisk:
        if disk.is_uri:
            checked = await check_uri(disk.argument)
        else:
            checked = await check_file(Path(disk.argument), disk.format)
        choose(self._overlay, checked.source)
        return checked

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        return SourceGuest(
            name=guest_name(self._disks[0].argument, is_uri=self._disks[0].is_uri),
            memory=_MEMORY,
            vcpus=_VCPUS,
            features=list(_FEATURES),
            display="window",
            disks=[disk.described(index) for index, disk in enumerate(self._checked, 1)],
            nics=[Nic()],
        )

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        sizes = await serve_overlays(
            [disk.source for disk in self._checked], self._overlay, v2vdir, servers
        )
        return with_sizes(source, sizes)


def guest_name(argument: str, *, is_uri: bool = False) -> str:
    """Return the guest's name from its first disk."""
    if is_uri:
        # virt-v2v has no such input; the export's name is the nearest thing to a file's.
        argument = re.sub(r"^[^:]*://[^/]*/?", "", argument.split("?")[0])
    return name_after(os.path.basename(argument.rstrip("/")), DISK_SUFFIXES)
