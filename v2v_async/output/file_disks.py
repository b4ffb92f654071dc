"""Target disks that are files in a directory: made, served, and given their names at the end.

Shared by every output that leaves disk images in a directory. While the guest is made everything
has hidden names (``output/files.py``); earlier files of the same names are replaced at the very
end. raw disks are served by nbdkit, qcow2 by qemu-nbd.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from v2v_async import nbdkit, qemu_img, qemu_nbd
from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceDisk
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.domain_xml import name_problem
from v2v_async.process import ServerCommand
from v2v_async.server import Servers
from v2v_async.units import drive_letters, format_size
from v2v_async.v2vdir import OutputFile, TargetExport, V2VDir

Format = Literal["raw", "qcow2"]

COMPRESSED_HELP = "compress the disks (only with -of qcow2)"
"""What ``-oo ?`` says of ``compressed``."""


@dataclass(frozen=True, slots=True)
class Document:
    """A file that is written beside the disks at the end: XML, JSON, a script."""

    final: Path
    content: bytes
    is_executable: bool = False


@dataclass(frozen=True, slots=True)
class FileDisks:
    """Disks in ``directory``; ``name`` is the output's, for messages (``-o local``).

    ``compat`` is of qcow2. Methods that begin with an underscore are for subclasses to change.
    """

    directory: Path
    name: str
    format: Format = "raw"
    is_preallocated: bool = False
    is_compressed: bool = False
    compat: Literal["0.10", "1.1"] = "1.1"

    @classmethod
    def parse(cls, options: OutputOptions, name: str) -> Self:
        """Read -os, -of, -oa and ``-oo compressed``; other ``-oo`` options are the caller's.

        Raises:
            UsageError: one is missing or wrong, or two contradict each other.
        """
        if options.storage is None:
            raise UsageError(
                f"{name} needs a directory to write to", hint="add -os DIR; it must exist"
            )
        # virt-v2v's man page says that the default is the source's format. What it does, in 2.2 as
        # in 2.10, is raw, whatever the source is.
        format_: Format
        match options.format:
            case None | "raw":
                format_ = "raw"
            case "qcow2":
                format_ = "qcow2"
            case other:
                raise UsageError(f"-of {other}: {name} writes raw or qcow2")
        is_compressed = False
        for option, value in options.options:
            if option == "compressed":
                is_compressed = parse_bool(option, value)
        is_preallocated = options.allocation == "preallocated"
        if is_compressed and format_ != "qcow2":
            raise UsageError("-oo compressed is only possible with -of qcow2")
        if is_compressed and is_preallocated:
            raise UsageError("-oo compressed and -oa preallocated exclude each other")
        return cls(Path(options.storage), name, format_, is_preallocated, is_compressed)

    async def check(self) -> None:
        """Check the directory, and that what serves the disks is installed.

        Raises:
            UsageError, TargetError, DependencyError
        """
        directory = self.directory
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise UsageError(f"-os ‘{directory}’ {what}", hint="make it first, or name another one")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise TargetError(f"-os ‘{directory}’: you may not write there")
        (await nbdkit.probe()).require(plugin="file")

    def check_finals(self, finals: Sequence[Path], disks: Sequence[SourceDisk]) -> None:
        """Check the files that will be made or replaced, disks and documents.

        ``disks``: all of the source's, which none of them may be.

        Raises:
            TargetError, UsageError
        """
        for final in finals:
            files.temporary_for(final)
            _refuse_source(final, disks)
            if final.is_dir():
                raise TargetError(
                    f"‘{final}’ is a directory", hint="move it, or give another name: -on NAME"
                )

    def check_room(self, disks: Sequence[SourceDisk], reporter: Reporter) -> None:
        """Check that there is room in ``directory`` for these disks.

        Raises:
            TargetError
        """
        free = files.free_space(self.directory)
        if self.is_preallocated:
            needed = sum(disk.size for disk in disks)
            if needed > free:
                raise TargetError(
                    f"‘{self.directory}’ has {format_size(free)} left, and preallocated disks "
                    f"need {format_size(needed)}",
                    hint="free space there, give another -os DIR, or leave out -oa preallocated",
                )
            return
        needed = sum(
            disk.size if disk.allocated is None else min(disk.allocated, disk.size)
            for disk in disks
        )
        if needed > free:
            reporter.warning(
                f"‘{self.directory}’ has {format_size(free)} left; the disks may need "
                f"{format_size(needed)}"
            )

    async def setup(
        self, v2vdir: V2VDir, finals: Sequence[Path], disks: Sequence[SourceDisk], servers: Servers
    ) -> None:
        """Make empty disks under hidden names, and serve them; ``finals``: a path for each."""
        for disk, final in zip(disks, finals, strict=True):
            temporary = files.temporary_for(final)
            v2vdir.add_output(OutputFile(temporary=str(temporary), final=str(final)))
            await self._make_disk(temporary, disk.size)
            files.identify(v2vdir, temporary)
            command = await self._server(temporary, v2vdir.target_socket(disk.index))
            log = v2vdir.log("output", disk.index)
            await servers.start(f"out{disk.index}", command, log=log)
        v2vdir.update(targets=[self._export(disk) for disk in disks])

    async def problem(
        self, v2vdir: V2VDir, finals: Sequence[Path], disks: Sequence[SourceDisk]
    ) -> str | None:
        """Return why what setup made can't be gone on with; None where it can.

        Nobody serves it. Names that were given too early have been taken back.

        Raises:
            TargetError: that can't be known now.
        """
        if self.is_compressed:
            return "a cluster can't be compressed twice"
        records = {record.final: record for record in v2vdir.state.outputs}
        for disk, final in zip(disks, finals, strict=True):
            record = records.get(str(final))
            if record is None:
                return f"‘{final}’ was not among the outputs"
            problem = await self._damage(record, disk.size)
            if problem is not None:
                return problem
        return None

    async def _damage(self, record: OutputFile, size: int) -> str | None:
        path = Path(record.temporary)
        try:
            status = path.lstat()
        except FileNotFoundError:
            return f"‘{path}’ is not there any more"
        except OSError as error:  # it may be there again the next time
            raise files.target_error("look at", path, error) from error
        if status.st_ino != record.inode or not stat.S_ISREG(status.st_mode):
            return f"‘{path}’ is not the file that was made"
        if self.format == "raw":
            found = status.st_size
        else:
            size = -(-size // qemu_img.SECTOR) * qemu_img.SECTOR
            try:
                await qemu_img.repair(path)
                found = (await qemu_img.info(path, format_="qcow2")).virtual_size
            except qemu_img.ImageError as error:
                if qemu_img.is_locked(error):
                    raise TargetError(error.message, hint="who has it open? lsof") from error
                return error.message
        return None if found == size else f"‘{path}’ has {found} bytes, not {size}"

    async def serve_again(
        self, v2vdir: V2VDir, finals: Sequence[Path], disks: Sequence[SourceDisk], servers: Servers
    ) -> None:
        """Serve what setup made, which has no :meth:`problem`; data may be in it."""
        for disk, record in zip(disks, made_disks(v2vdir, finals), strict=True):
            socket = v2vdir.target_socket(disk.index)
            command = await self._server(Path(record.temporary), socket)
            log = v2vdir.log("output", disk.index)
            await servers.start(f"out{disk.index}", command, log=log)
        exports = [self._export(disk) for disk in disks]
        v2vdir.update(
            targets=[each.model_copy(update={"is_known_zero": False}) for each in exports]
        )

    def take_back(self, v2vdir: V2VDir, finals: Sequence[Path]) -> None:
        """Undo what a process did that was killed in :meth:`publish`; ``finals``: the disks'.

        The documents are removed: they are written anew.

        Raises:
            TargetError: a file can't be renamed.
        """
        files.unpublish(v2vdir, self._acting)
        outputs = v2vdir.state.outputs
        disks = {str(final) for final in finals}
        with self._acting():
            files.remove_temporary([each for each in outputs if each.final not in disks])
        v2vdir.update(outputs=[each for each in outputs if each.final in disks])

    async def publish(
        self,
        v2vdir: V2VDir,
        finals: Sequence[Path],
        documents: Sequence[Document],
        *,
        is_last: bool = True,
    ) -> None:
        """Write the documents, have everything on the disk, then give all files their names.

        ``is_last``: the guest is made by that.

        Raises:
            TargetError: nothing has got its name.
        """
        made = made_disks(v2vdir, finals)
        for document in documents:
            temporary = files.temporary_for(document.final)
            record = OutputFile(temporary=str(temporary), final=str(document.final))
            v2vdir.add_output(record)
            try:
                self._write(temporary, document)
            except OSError as error:
                raise files.target_error("write", temporary, error) from error
            files.identify(v2vdir, temporary)
            made.append(record)
        for file in made:
            await files.sync(Path(file.temporary))
        # No await from here on, so that no cancellation comes between two of the renames.
        files.publish(v2vdir, made, is_last=is_last)
        self._close(v2vdir)

    def _acting(self) -> AbstractContextManager[None]:
        """Be who may rename and remove the files."""
        return nullcontext()

    def _make_file(self, path: Path) -> None:
        """Make the empty file of a disk."""
        files.make_empty(path)

    def _write(self, path: Path, document: Document) -> None:
        """Make and write the file of a document.

        Raises:
            OSError, TargetError
        """
        files.make_empty(path)
        path.write_bytes(document.content)
        if document.is_executable:
            # As chmod +x: whoever may read it may run it.
            mode = path.stat().st_mode
            path.chmod(mode | (mode & 0o444) >> 2)

    def _close(self, v2vdir: V2VDir) -> None:
        """Do what is left when all files have their names. Must not fail."""

    async def _make_disk(self, path: Path, size: int) -> None:
        self._make_file(path)
        if self.format == "raw":
            await files.make_raw(path, size, preallocated=self.is_preallocated)
            return
        if self.is_compressed:
            # qemu-nbd compresses whole clusters, and refuses an image that ends within one.
            size = -(-size // qemu_nbd.CLUSTER_SIZE) * qemu_nbd.CLUSTER_SIZE
        try:
            if self.is_preallocated and size > files.free_space(path.parent):
                raise TargetError(
                    f"can't give {size} bytes to ‘{path}’: no space left",
                    hint="free space there, give another -os DIR, or leave out -oa preallocated",
                )
            # Clusters are reserved without being written: they read as zeroes at once.
            preallocation: Literal["falloc", "off"] = "falloc" if self.is_preallocated else "off"
            await qemu_img.create_qcow2(path, size, preallocation=preallocation, compat=self.compat)
        except qemu_img.ImageError as error:
            raise TargetError(error.message, hint="is there room in -os DIR?") from error

    async def _server(self, path: Path, socket: Path) -> ServerCommand:
        if self.format == "qcow2":
            return qemu_nbd.serve_target(path, socket, compress=self.is_compressed)
        return nbdkit.serve_target_file(await nbdkit.probe(), path, socket)

    def _export(self, disk: SourceDisk) -> TargetExport:
        if not self.is_compressed:
            return TargetExport(index=disk.index, is_known_zero=True)
        # A cluster can be compressed once, as a whole, and by one writer.
        return TargetExport(
            index=disk.index,
            is_known_zero=True,
            max_connections=1,
            request_size=qemu_nbd.CLUSTER_SIZE,
        )

    def disk_paths(self, count: int, name: str) -> list[Path]:
        """Return the paths as virt-v2v names them: ``DIR/NAME-sda`` and so on."""
        directory = self.directory.absolute()
        return [directory / f"{name}-sd{drive_letters(i)}" for i in range(count)]


def made_disks(v2vdir: V2VDir, finals: Sequence[Path]) -> list[OutputFile]:
    """Return the records of the disks, in order; setup may have run in another process.

    Raises:
        TargetError: setup has not made one of them.
    """
    records = {record.final: record for record in v2vdir.state.outputs}
    missing = [path for path in finals if str(path) not in records]
    if missing:
        raise TargetError(
            f"‘{missing[0]}’ is not among the outputs of this run",
            hint="the output must be set up first, with the same options",
        )
    return [records[str(path)] for path in finals]


def _refuse_source(final: Path, disks: Sequence[SourceDisk]) -> None:
    """Refuse to replace what the source reads: ``-i disk DIR/web-sda … -os DIR`` would."""
    for disk in disks:
        for path in disk.files:
            with suppress(OSError):
                if final.samefile(path):
                    raise UsageError(
                        f"the target ‘{final}’ would replace what the source's disk {disk.index} "
                        "is read from",
                        hint="write to another directory, or give another name: -on NAME",
                    )


def check_name(name: str) -> None:
    """Refuse a name that a domain or part of a file's name can't be.

    Raises:
        UsageError: it says why.
    """
    problem = name_problem(name)
    if problem is not None:
        raise UsageError(
            f"{name!r} can't be the name of the new guest: {problem}", hint="give one: -on NAME"
        )


def parse_bool(option: str, value: str | None) -> bool:
    """Return what ``-oo OPTION[=VALUE]`` says.

    Raises:
        UsageError: neither yes nor no.
    """
    match (value or "").lower():
        case "" | "true" | "1" | "yes" | "on":
            return True
        case "false" | "0" | "no" | "off":
            return False
        case _:
            raise UsageError(f"-oo {option}={value}: write true or false")
