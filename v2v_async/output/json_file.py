"""``-o json``: disk images and one JSON file that says everything of the guest.

::

    DIR/NAME-sda  DIR/NAME-sdb …     or as -oo json-disks-pattern says, also in folders below DIR
    DIR/NAME.json
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Self

from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.directory import DirectoryOutput
from v2v_async.output.domain_xml import name_problem
from v2v_async.output.file_disks import COMPRESSED_HELP, Document, FileDisks
from v2v_async.output.json_model import target_document
from v2v_async.output.uefi import find_uefi
from v2v_async.server import Servers
from v2v_async.units import drive_letters
from v2v_async.v2vdir import MadeObject, V2VDir

PATTERN_HELP = (
    "where the disks go below DIR, with %{GuestName}, %{DiskNo} (1, 2 …), %{DiskDeviceName} (sda, "
    "sdb …), %% (default: %{GuestName}-%{DiskDeviceName})"
)
"""What ``-oo ?`` says of ``json-disks-pattern``."""

_DEFAULT = "%{GuestName}-%{DiskDeviceName}"
_VARIABLES = ("DiskNo", "DiskDeviceName", "GuestName")
_FOLDER = "folder"
"""Kind of the objects in state.json: folders that setup made."""


class JsonOutput(DirectoryOutput):
    """Files in a directory, described by JSON."""

    name = "json"
    option_help = {"compressed": COMPRESSED_HELP, "json-disks-pattern": PATTERN_HELP}
    suffix = ".json"

    def __init__(self, disks: FileDisks, pattern: str = _DEFAULT) -> None:
        super().__init__(disks)
        self.pattern = pattern

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -oo, -on and refuse -oc and -op."""
        if options.connection is not None:
            raise UsageError("-o json takes no -oc: everything is written to -os DIR")
        made = super().parse(options)
        patterns = [value for name, value in options.options if name == "json-disks-pattern"]
        if len(patterns) > 1:
            raise UsageError("-oo json-disks-pattern may be given once")
        if patterns:
            made.pattern = patterns[0] or ""
            # With any name and number, so that a mistake is known at once.
            expand_pattern(made.pattern, options.name or "guest", 0)
        return made

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Also check that each disk has a place of its own, in folders that can be made."""
        self.check_name(name)
        paths = [*self.disk_paths(len(source.disks), name), self.document_path(name)]
        for number, path in enumerate(paths):
            if path in paths[:number]:
                raise UsageError(
                    f"-oo json-disks-pattern={self.pattern}: two files would be ‘{path}’",
                    hint="put %{DiskNo} or %{DiskDeviceName} into it",
                )
        for folder in self._folders(paths):
            if os.path.lexists(folder) and not folder.is_dir():
                raise TargetError(
                    f"‘{folder}’ is not a folder, and -oo json-disks-pattern puts disks there",
                    hint="move it, or change the pattern",
                )
        await super().check_source(source, name, reporter)

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make the folders of the pattern, then empty disks, and serve them."""
        await self.check_source(source, name, reporter)
        for folder in self._folders(self.disk_paths(len(source.disks), name)):
            if folder.is_dir():
                continue
            undo = f"rmdir {shlex.quote(str(folder))}"
            v2vdir.add_object(MadeObject(kind=_FOLDER, name=str(folder), undo=undo))
            try:
                folder.mkdir()
            except OSError as error:
                raise files.target_error("make", folder, error) from error
        await super().setup(v2vdir, source, name, servers, reporter)

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Publish everything; the folders are part of the result from then on."""
        await super().finalize(v2vdir, target, reporter)
        for made in _made_folders(v2vdir):
            v2vdir.forget_object(made)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove the disks, then the folders, inner ones first."""
        await super().abandon(v2vdir, reporter)
        if v2vdir.state.is_finalized:
            return
        for made in reversed(_made_folders(v2vdir)):
            try:
                os.rmdir(made.name)
            except FileNotFoundError:
                pass
            except OSError as error:
                reporter.warning(
                    f"the folder ‘{made.name}’ can't be removed: {error.strerror}; try: {made.undo}"
                )
                continue
            v2vdir.forget_object(made)

    def documents(
        self, target: TargetGuest, paths: Sequence[Path], reporter: Reporter
    ) -> list[Document]:
        """Return the JSON."""
        uefi = find_uefi(target.guestcaps.arch, secure=target.secure_boot)
        document = target_document(target, paths, self.disks.format, uefi)
        return [Document(self.document_path(target.name), document.to_json())]

    def disk_paths(self, count: int, name: str) -> list[Path]:
        """Return the paths that the pattern makes."""
        directory = self.disks.directory.absolute()
        return [directory / expand_pattern(self.pattern, name, number) for number in range(count)]

    def _folders(self, paths: Sequence[Path]) -> list[Path]:
        """Return the folders between DIR and ``paths``, outer ones first."""
        directory = self.disks.directory.absolute()
        folders: dict[Path, None] = {}
        for path in paths:
            for parent in reversed(path.parents):
                if parent.is_relative_to(directory) and parent != directory:
                    folders[parent] = None
        return list(folders)


def expand_pattern(pattern: str, name: str, number: int) -> PurePosixPath:
    """Return where disk ``number`` (from 0) goes below the directory.

    Raises:
        UsageError: an unknown variable, or a place that is no file below the directory.
    """
    values = {
        "DiskNo": str(number + 1),
        "DiskDeviceName": f"sd{drive_letters(number)}",
        "GuestName": name,
    }

    def value(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        if match[1] not in values:
            raise UsageError(
                f"-oo json-disks-pattern={pattern}: there is no variable {match[0]}",
                hint="there are " + ", ".join(f"%{{{each}}}" for each in _VARIABLES),
            )
        return values[match[1]]

    expanded = re.sub(r"%%|%\{([^}]*)\}", value, pattern)
    path = PurePosixPath(expanded)
    wrong = None
    if path.is_absolute():
        wrong = "it leads out of -os DIR"
    elif expanded.endswith("/") or not path.parts:
        wrong = "it names no file"
    else:
        wrong = next(filter(None, map(name_problem, path.parts)), None)
    if wrong is not None:
        raise UsageError(
            f"-oo json-disks-pattern={pattern!r}: {wrong}",
            hint="for example: %{GuestName}/disk%{DiskNo}.img",
        )
    return path


def _made_folders(v2vdir: V2VDir) -> list[MadeObject]:
    return [made for made in v2vdir.state.objects if made.kind == _FOLDER]
