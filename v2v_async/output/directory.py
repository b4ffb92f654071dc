"""What outputs that leave disks and one document in a directory have in common.

Where a disk's name is a block device already, or a link to one, that is written in its place.

::

    parse ─ FileDisks.parse ─ check_name     disks: where each disk goes
    check_source ─ setup ─ (copy) ─ finalize: documents() ─ all files get their names at once
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceDisk, SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import existing_disks, files
from v2v_async.output.contract import Output, refuse_finalized, reported
from v2v_async.output.existing_disks import InPlace
from v2v_async.output.file_disks import Document, FileDisks, check_name
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir


class DirectoryOutput(Output):
    """Disks as files, and a document that is written beside them at the end."""

    suffix: ClassVar[str]
    """Of the document: ``.json``."""

    def __init__(self, disks: FileDisks) -> None:
        self.disks = disks

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -oo, -on and refuse -op."""
        cls.refuse_unknown(options)
        disks = FileDisks.parse(options, f"-o {cls.name}")
        if options.name is not None:
            cls.check_name(options.name)
        return cls(disks)

    @classmethod
    def refuse_unknown(cls, options: OutputOptions) -> None:
        """Refuse what this output has no use for.

        Raises:
            UsageError: -op, or a ``-oo`` that it does not know.
        """
        if options.password is not None:
            raise UsageError(f"-o {cls.name} takes no -op: no password is needed")
        for option, _ in options.options:
            if option not in cls.option_help:
                known = ", ".join(f"-oo {each}" for each in cls.option_help)
                raise UsageError(
                    f"-o {cls.name} has no option ‘-oo {option}’", hint=f"it has: {known}"
                )

    @classmethod
    def check_name(cls, name: str) -> None:
        """Refuse a name that can't be part of a file's.

        Raises:
            UsageError: it says why.
        """
        check_name(name)

    async def check(self, reporter: Reporter) -> None:
        """See :class:`Output`."""
        await self.disks.check()

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name, what will be replaced or written over, and the room there is."""
        self.check_name(name)
        new, there = self._places(source, name)
        await existing_disks.check(there, source.disks, self.disks.format)
        self.disks.check_finals([*new, self.document_path(name)], source.disks)
        self.check_room(new, reporter)

    def why_not_early(self, source: SourceGuest, name: str) -> str | None:
        """What is there already keeps what it has until the guest is converted."""
        _, there = self._places(source, name)
        if there:
            return (
                f"‘{there[0].path}’ is written in place, and only when the conversion has gone well"
            )
        return None

    def check_room(self, disks: Mapping[Path, SourceDisk], reporter: Reporter) -> None:
        """Check that there is room for these disks.

        Raises:
            TargetError
        """
        self.disks.check_room(list(disks.values()), reporter)

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make empty disks under hidden names and serve them, and what is written in place."""
        await self.check_source(source, name, reporter)
        new, there = self._places(source, name)
        await self.disks.setup(v2vdir, list(new), list(new.values()), servers)
        await existing_disks.setup(v2vdir, there, self.disks.format, servers)

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the files again, under their hidden names, and what is written in place."""
        refuse_finalized(v2vdir)
        new, there = self._places(source, name)
        self.disks.take_back(v2vdir, list(new))
        problem = await self.disks.problem(
            v2vdir, list(new), list(new.values())
        ) or await existing_disks.problem(v2vdir, there, self.disks.format)
        if problem is not None:
            reporter.warning(f"the disks are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await self.disks.serve_again(v2vdir, list(new), list(new.values()), servers)
        await existing_disks.serve(v2vdir, there, self.disks.format, servers)
        return True

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Write the document, have everything on the disk, then give all files their names."""
        paths = self.disk_paths(len(target.source.disks), target.name)
        there = {path: self.existing(path) for path in paths}
        await existing_disks.finish(v2vdir, [path for path in there.values() if path is not None])
        documents = self.documents(target, [there[path] or path for path in paths], reporter)
        new = [path for path in paths if there[path] is None]
        await self.disks.publish(v2vdir, new, documents)
        existing_disks.release(v2vdir)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what has not got its final name yet; say what was only written to."""
        if v2vdir.state.is_finalized:
            files.remove_previous(v2vdir)
            return
        with reported(reporter):
            files.unpublish(v2vdir)
        files.remove_temporary(v2vdir.state.outputs)
        existing_disks.abandon(v2vdir, reporter)

    @abstractmethod
    def documents(
        self, target: TargetGuest, paths: Sequence[Path], reporter: Reporter
    ) -> list[Document]:
        """Return what is written beside the disks; ``paths``: theirs, in the source's order.

        A block device has the path of the device.

        Called before anything has its final name.
        """

    def existing(self, path: Path) -> Path | None:
        """Return what is there already to be written in place; None where a file is made.

        Raises:
            UsageError, TargetError: it can't be.
        """
        device = existing_disks.device_at(path)
        if device is not None and self.disks.format != "raw":
            raise UsageError(
                f"-of {self.disks.format}: ‘{path}’ is the block device ‘{device}’, which is "
                "written as raw",
                hint=f"leave out -of {self.disks.format}, or move ‘{path}’ away",
            )
        return device

    def _places(
        self, source: SourceGuest, name: str
    ) -> tuple[dict[Path, SourceDisk], list[InPlace]]:
        """Return the files to make, by path, and what is there already."""
        new, there = {}, []
        for path, disk in zip(self.disk_paths(len(source.disks), name), source.disks, strict=True):
            existing = self.existing(path)
            if existing is None:
                new[path] = disk
            else:
                there.append(InPlace(existing, disk))
        return new, there

    def disk_paths(self, count: int, name: str) -> list[Path]:
        """Return where the disks go, absolute."""
        return self.disks.disk_paths(count, name)

    def document_path(self, name: str) -> Path:
        """Return where the document goes, absolute."""
        return self.disks.directory.absolute() / f"{name}{self.suffix}"
