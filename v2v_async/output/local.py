"""``-o local`` (``-o disk``): disk images and a libvirt XML in a directory.

::

    DIR/NAME-sda  DIR/NAME-sdb …  DIR/NAME.xml       as virt-v2v names them
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.contract import Output
from v2v_async.output.domain_xml import TargetDisk, domain_xml, name_problem
from v2v_async.output.file_disks import COMPRESSED_HELP, Document, FileDisks
from v2v_async.output.uefi import uefi_for
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir


class LocalOutput(Output):
    """Files in a directory."""

    name = "local"
    option_help = {"compressed": COMPRESSED_HELP}

    def __init__(self, disks: FileDisks) -> None:
        self.disks = disks

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -oo, -on and refuse -op."""
        if options.password is not None:
            raise UsageError("-o local takes no -op: no password is needed")
        for option, _ in options.options:
            if option not in cls.option_help:
                raise UsageError(
                    f"-o local has no option ‘-oo {option}’", hint="it has: -oo compressed"
                )
        disks = FileDisks.parse(options, "-o local")
        if options.name is not None:
            check_name(options.name)
        return cls(disks)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Output`."""
        await self.disks.check()

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name, the files that will be replaced, and the room there is."""
        check_name(name)
        finals = [*self._disk_paths(source, name), self._xml_path(name)]
        self.disks.check_room(finals, source.disks, reporter)

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make empty disks under hidden names and serve them."""
        await self.check_source(source, name, reporter)
        await self.disks.setup(v2vdir, self._disk_paths(source, name), source.disks, servers)

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Write the XML, have everything on the disk, then give all files their names."""
        paths = self._disk_paths(target.source, target.name)
        disks = {
            disk.index: TargetDisk(str(path), self.disks.format)
            for disk, path in zip(target.source.disks, paths, strict=True)
        }
        xml = domain_xml(target, disks, uefi_for(target, reporter))
        await self.disks.publish(v2vdir, paths, [Document(self._xml_path(target.name), xml)])

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what has not got its final name yet."""
        files.remove_temporary(v2vdir.state.outputs)

    def _disk_paths(self, source: SourceGuest, name: str) -> list[Path]:
        return self.disks.disk_paths(len(source.disks), name)

    def _xml_path(self, name: str) -> Path:
        return self.disks.directory.absolute() / f"{name}.xml"


def check_name(name: str) -> None:
    """Refuse a name that a domain or a file can't have.

    Raises:
        UsageError: it says why.
    """
    problem = name_problem(name)
    if problem is not None:
        raise UsageError(
            f"{name!r} can't be the name of the new guest: {problem}", hint="give one: -on NAME"
        )
