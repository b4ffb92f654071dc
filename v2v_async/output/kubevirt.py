"""``-o kubevirt``: disk images and the YAML of a ``VirtualMachine``.

::

    DIR/NAME-sda  DIR/NAME-sdb …     or where -oo disk=PATH says, once for each disk
    DIR/NAME.yaml                    NAME made to comply with RFC 1123

With ``-oo create=false`` the disks of ``-oo disk`` are there already, as mounted volumes of the
cluster are, and are written in place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import yaml

from v2v_async import nbdkit
from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceDisk, SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.file_disks import COMPRESSED_HELP, Document, FileDisks, parse_bool
from v2v_async.output.kubevirt_yaml import compliant_name, virtual_machine

DISK_HELP = "where a disk goes, in place of DIR/NAME-sdX; once for each disk"
CREATE_HELP = (
    "false: the disks of -oo disk are there already, files or block devices (default: true)"
)


class KubevirtOutput(DirectoryOutput):
    """Disks, and a VirtualMachine for ``kubectl create -f``."""

    name = "kubevirt"
    option_help = {"compressed": COMPRESSED_HELP, "create": CREATE_HELP, "disk": DISK_HELP}
    suffix = ".yaml"

    def __init__(
        self, disks: FileDisks, places: tuple[Path, ...] = (), *, is_created: bool = True
    ) -> None:
        super().__init__(disks)
        self.places = places
        self.is_created = is_created

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -oo, -on and refuse -op."""
        made = super().parse(options)
        for option, value in options.options:
            if option == "disk":
                if not value:
                    raise UsageError("-oo disk needs a path", hint="-oo disk=PATH")
                made.places = (*made.places, Path(value).absolute())
            elif option == "create":
                made.is_created = parse_bool(option, value)
        if len(set(made.places)) != len(made.places):
            raise UsageError("two -oo disk name the same file")
        if not made.is_created:
            if not made.places:
                raise UsageError(
                    "-oo create=false writes to disks that are there already",
                    hint="name them: -oo disk=PATH, once for each disk",
                )
            if made.disks.is_compressed or made.disks.is_preallocated:
                raise UsageError(
                    "-oo create=false makes no disks, so that -oo compressed and -oa preallocated "
                    "have no meaning"
                )
        return made

    @classmethod
    def check_name(cls, name: str) -> None:
        """Take any name: it is made to comply."""

    async def check(self, reporter: Reporter) -> None:
        """Check -os, and the folders of -oo disk."""
        await self.disks.check()
        if not self.is_created:
            (await nbdkit.probe()).require(plugin="file")
            return
        for place in self.places:
            if not place.parent.is_dir():
                raise UsageError(
                    f"-oo disk=‘{place}’: there is no folder ‘{place.parent}’",
                    hint="make it first, or name another place",
                )
            if not os.access(place.parent, os.W_OK | os.X_OK):
                raise TargetError(f"-oo disk=‘{place}’: you may not write in its folder")
            if place.exists() and not place.is_file():
                raise UsageError(
                    f"-oo disk=‘{place}’ is not a file",
                    hint="write to what is there already: -oo create=false",
                )

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check that there is a place for each disk, and room."""
        if self.places and len(self.places) != len(source.disks):
            raise UsageError(
                f"-oo disk names {len(self.places)} of the guest's disks, which has "
                f"{len(source.disks)}",
                hint="give it once for each disk, in their order",
            )
        document = self.document_path(name)
        if document in self.places:
            raise UsageError(f"-oo disk=‘{document}’ is where the YAML goes")
        await super().check_source(source, name, reporter)

    def check_room(self, disks: Mapping[Path, SourceDisk], reporter: Reporter) -> None:
        """Check each file system that disks go to."""
        for folder, there in _by_file_system(disks).items():
            replace(self.disks, directory=folder).check_room(there, reporter)

    def existing(self, path: Path) -> Path | None:
        """Return the disk itself where none are made."""
        return super().existing(path) if self.is_created else path

    def documents(
        self, target: TargetGuest, paths: Sequence[Path], reporter: Reporter
    ) -> list[Document]:
        """Return the YAML, and tell what KubeVirt can't do as the source did."""
        by_index = {
            disk.index: str(path) for disk, path in zip(target.source.disks, paths, strict=True)
        }
        machine = virtual_machine(target, by_index)
        for remark in machine.remarks:
            reporter.warning(remark)
        if self.disks.format != "raw":
            reporter.warning(
                "KubeVirt reads disks of a host (hostDisk) as raw: import the qcow2 files, "
                "for example by virtctl image-upload, or convert with -of raw"
            )
        # ASCII: with allow_unicode PyYAML writes a NEL (U+0085) so that it is read as a space.
        text = yaml.safe_dump(machine.document, sort_keys=False).encode("ascii")
        return [Document(self.document_path(target.name), text)]

    def disk_paths(self, count: int, name: str) -> list[Path]:
        """Return where the disks go, absolute."""
        return list(self.places) or super().disk_paths(count, compliant_name(name))

    def document_path(self, name: str) -> Path:
        """Return where the YAML goes, absolute."""
        return super().document_path(compliant_name(name))


def _by_file_system(disks: Mapping[Path, SourceDisk]) -> dict[Path, list[SourceDisk]]:
    """Return the disks that share a file system, under a folder of it."""
    folders: dict[int, Path] = {}
    found: dict[Path, list[SourceDisk]] = {}
    for path, disk in disks.items():
        folder = folders.setdefault(path.parent.stat().st_dev, path.parent)
        found.setdefault(folder, []).append(disk)
    return found
