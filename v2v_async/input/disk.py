"""``-i disk`` (``-i local`` is the same): disk images, block devices and NBD exports.

Each argument is a file, a block device or an NBD URI (``nbd://``, ``nbd+unix://``, ``nbds://``);
together they are the disks of one guest, in order. There is no metadata: name, memory and the
like are what virt-v2v assumes.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from v2v_async import qemu_img
from v2v_async.connection import export_info
from v2v_async.errors import NbdError, SourceError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.contract import Input
from v2v_async.input.overlay import DiskSource, OverlayKind, choose
from v2v_async.model import Nic, SourceDisk, SourceGuest
from v2v_async.options import InputOptions
from v2v_async.redact import redact
from v2v_async.server import Servers
from v2v_async.units import GIB
from v2v_async.v2vdir import V2VDir

_URI = re.compile(r"nbds?(\+unix|\+vsock)?://", re.IGNORECASE)
_SUFFIXES = (".img", ".qcow2", ".raw", ".vmdk", "-sda")
"""What virt-v2v takes off the first disk's name to get the guest's; only one of them."""

# What virt-v2v's disk input assumes: the file says nothing about the machine.
_MEMORY = 2 * GIB
_VCPUS = 1
_FEATURES = ["acpi", "apic", "pae"]

FORMATS = ("raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi", "qed", "parallels", "luks")
_ALIASES = {"vhd": "vpc"}

# Chains are short; this only ends one that goes round.
_LONGEST_CHAIN = 200


@dataclass(frozen=True, slots=True)
class _Disk:
    """An argument; size (bytes) and format are known after check."""

    argument: str
    is_uri: bool
    format: str | None
    size: int = 0
    allocated: int | None = None
    files: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The argument for people: without a password."""
        return redact(self.argument)


class DiskInput(Input):
    """One guest made of the disks named on the command line."""

    name: ClassVar[str] = "disk"
    option_help: ClassVar[dict[str, str]] = {
        "overlay": "cow or qcow2: what keeps the source from being written (default: cow for raw "
        "disks and NBD, qcow2 for other formats)"
    }

    def __init__(self, disks: list[_Disk], overlay: OverlayKind | None) -> None:
        self._disks = disks
        self._overlay: OverlayKind | None = overlay

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
        overlay: OverlayKind | None = None
        for key, value in options.options:
            if key != "overlay" or value not in ("cow", "qcow2"):
                shown = key if value is None else f"{key}={value}"
                raise UsageError(
                    f"-i disk: unknown option ‘-io {redact(shown)}’",
                    hint="write overlay=cow or overlay=qcow2",
                )
            overlay = "cow" if value == "cow" else "qcow2"
        image_format = options.format
        if image_format is not None:
            image_format = _ALIASES.get(image_format, image_format)
            if image_format not in FORMATS:
                raise UsageError(
                    f"unknown format ‘-if {options.format}’",
                    hint=f"the formats are: {', '.join([*FORMATS, *_ALIASES])}",
                )
        disks = []
        for argument in options.arguments:
            is_uri = _URI.match(argument) is not None
            if not is_uri and re.match(r"[a-z][a-z0-9+.-]*://", argument):
                raise UsageError(
                    f"‘{redact(argument)}’ is not a kind of URI that -i disk reads",
                    hint="it reads files, block devices, nbd://, nbd+unix:// and nbds://",
                )
            if is_uri and image_format not in (None, "raw"):
                raise UsageError(
                    f"‘-if {options.format}’: an NBD export is raw; serve the image with "
                    "qemu-nbd, which reads its format"
                )
            disks.append(_Disk(argument, is_uri, "raw" if is_uri else image_format))
        seen: set[str] = set()
        for disk in disks:
            key = disk.argument if disk.is_uri else os.path.realpath(disk.argument)
            if key in seen:
                raise UsageError(f"the disk ‘{disk.shown}’ was named twice")
            seen.add(key)
        return cls(disks, overlay)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Input`."""
        problems: list[tuple[int, V2VError]] = []
        checked = []
        for index, disk in enumerate(self._disks, 1):
            try:
                checked.append(await (_check_uri(disk) if disk.is_uri else _check_file(disk)))
                choose(self._overlay, _source(checked[-1]))
            except V2VError as error:
                problems.append((index, error))
        if len(problems) == 1:
            index, only = problems[0]
            only.locate(disk=index)
            raise only
        if problems:
            told = "; ".join(f"disk {index}: {problem.message}" for index, problem in problems)
            raise SourceError(f"{len(problems)} disks can't be used: {told}")
        self._disks = checked

    async def describe(self) -> SourceGuest:
        """See :class:`Input`."""
        return SourceGuest(
            name=guest_name(self._disks[0].argument, is_uri=self._disks[0].is_uri),
            memory=_MEMORY,
            vcpus=_VCPUS,
            features=list(_FEATURES),
            display="window",
            disks=[
                SourceDisk(
                    index=index,
                    source=disk.shown,
                    format=disk.format or "raw",
                    size=disk.size,
                    allocated=disk.allocated,
                    files=list(disk.files),
                )
                for index, disk in enumerate(self._disks, 1)
            ],
            nics=[Nic()],
        )

    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """See :class:`Input`."""
        source = await self.describe()
        sizes = {}
        for index, disk in enumerate(self._disks, 1):
            where = _source(disk)
            overlay = choose(self._overlay, where)
            try:
                command = await overlay.prepare(
                    where, index, v2vdir.source_socket(index), v2vdir.path
                )
                server = await servers.start(f"in{index}", command, log=v2vdir.log("input", index))
            except V2VError as error:
                error.locate(disk=index)
                raise
            assert server.info is not None
            sizes[index] = server.info.size
        disks = [disk.model_copy(update={"size": sizes[disk.index]}) for disk in source.disks]
        return source.model_copy(update={"disks": disks})


def guest_name(argument: str, *, is_uri: bool = False) -> str:
    """Return the guest's name from its first disk, as virt-v2v makes it."""
    if is_uri:
        # virt-v2v has no such input; the export's name is the nearest thing to a file's.
        path = re.sub(r"^[^:]*://[^/]*/?", "", argument.split("?")[0])
        name = path.rstrip("/").rpartition("/")[2]
    else:
        name = os.path.basename(argument.rstrip("/"))
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    return name or "guest"


def _source(disk: _Disk) -> DiskSource:
    location = disk.argument if disk.is_uri else str(Path(disk.argument).absolute())
    return DiskSource(location, disk.format or "raw", disk.is_uri, disk.size)


async def _check_file(disk: _Disk) -> _Disk:
    path = Path(disk.argument)
    try:
        status = path.stat()
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            raise SourceError(f"‘{path}’ is a directory, not a disk image")
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise SourceError(f"‘{path}’ is neither a file nor a block device")
        with path.open("rb"):
            pass
    except OSError as error:
        raise SourceError(
            f"the disk ‘{path}’ can't be read: {error.strerror}",
            hint="check the name" if isinstance(error, FileNotFoundError) else "check its mode",
        ) from error
    if stat.S_ISREG(mode) and status.st_size == 0:
        raise SourceError(f"the disk ‘{path}’ is empty (0 bytes)")
    try:
        info = await qemu_img.info(path, format_=disk.format)
    except V2VError as error:
        raise SourceError(
            f"the disk ‘{path}’ can't be read{f' as {disk.format}' if disk.format else ''}: "
            f"{error.message}",
            hint="give its format with -if" if disk.format is None else "check -if",
        ) from error
    if info.virtual_size == 0:
        raise SourceError(f"the disk ‘{path}’ is empty (0 bytes)")
    if info.format not in FORMATS:
        raise SourceError(
            f"the disk ‘{path}’ has the format {info.format}, which is not supported",
            hint=f"supported are: {', '.join(FORMATS)}",
        )
    return replace(
        disk,
        format=info.format,
        size=info.virtual_size,
        allocated=info.allocated,
        files=(str(path.absolute()), *await _backing_files(info)),
    )


async def _backing_files(info: qemu_img.ImageInfo) -> tuple[str, ...]:
    """Return the chain under an image, as far as it is made of files that can be looked at."""
    found: list[str] = []
    while info.backing_file is not None and len(found) < _LONGEST_CHAIN:
        found.append(info.backing_file)
        try:
            info = await qemu_img.info(Path(info.backing_file))
        except V2VError:
            break  # the server will say it better when it opens the image
    return tuple(found)


async def _check_uri(disk: _Disk) -> _Disk:
    try:
        info = await export_info(disk.argument)
    except NbdError as error:
        raise SourceError(
            error.message, hint="is the server running, and the URI right?"
        ) from error
    except TimeoutError as error:
        raise SourceError(f"‘{disk.shown}’ does not answer") from error
    if info.size == 0:
        raise SourceError(f"the export ‘{disk.shown}’ is empty (0 bytes)")
    return replace(disk, size=info.size)
