"""``-o rhv`` (``-o ovirt``, ``-o rhev``): an export storage domain of oVirt or RHV.

::

    EXPORT/DOMAIN_UUID/dom_md/metadata              says that it is an export domain
                       images/IMAGE_UUID/…          the disks (``output/ovirt/volumes.py``)
                       master/vms/VM_UUID/VM.ovf    the guest, ready to be imported

UUIDs are made here: those of the disks at setup, in the final paths that ``state.json`` keeps.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output, refuse_finalized
from v2v_async.output.file_disks import made_disks
from v2v_async.output.ovirt import nfs
from v2v_async.output.ovirt.access import probe_access
from v2v_async.output.ovirt.guest import check_guest, check_name, guest_documents, is_uuid, silent
from v2v_async.output.ovirt.volumes import (
    VolumeDisks,
    finished_volume,
    make_folder,
    remove_folders,
    remove_made,
)
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir


@dataclass(frozen=True, slots=True)
class StorageDomain:
    """The folder of a storage domain; its name is the domain's UUID."""

    path: Path

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return self.path.name

    @property
    def images(self) -> Path:
        """Where the disks are."""
        return self.path / "images"

    @property
    def guests(self) -> Path:
        """Where the OVFs are."""
        return self.path / "master" / "vms"


class RhvOutput(Output):
    """A guest in an export storage domain, to be imported by the engine."""

    name = "rhv"

    def __init__(self, disks: VolumeDisks, storage: str) -> None:
        self.disks = disks
        self.storage = storage

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -on; refuse -oo and -op."""
        if options.password is not None:
            raise UsageError("-o rhv takes no -op: no password is needed")
        for option, _ in options.options:
            raise UsageError(f"-o rhv has no option ‘-oo {option}’", hint="it takes no -oo at all")
        if not options.storage:
            raise UsageError(
                "-o rhv needs an export storage domain",
                hint="add -os HOST:/EXPORT, or -os DIR where it is mounted already",
            )
        if options.name is not None:
            check_name(options.name)
        return cls(VolumeDisks.parse(options, "-o rhv"), options.storage)

    async def check(self, reporter: Reporter) -> None:
        """Mount the export if it is one, find the domain, and write there for a try."""
        async with self._reached(reporter) as directory:
            domain = find_domain(directory, self.storage, reporter)
            for folder in (domain.images, domain.guests):
                probe_access(folder, reporter if folder == domain.images else silent(reporter))
            await replace(self.disks, directory=domain.images).check()

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name, the disks' sizes, and the room there is."""
        check_guest(source, name)
        async with self._reached(reporter) as directory:
            domain = find_domain(directory, self.storage, silent(reporter))
            self._check_room(domain, source, reporter)

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Mount the export for the run; make a folder and an empty disk in it for each disk."""
        check_guest(source, name)
        directory = self._directory()
        if nfs.is_export(self.storage):
            directory = await nfs.mount(v2vdir, self.storage)
        domain = find_domain(directory, self.storage, silent(reporter))
        self._check_room(domain, source, reporter)
        access = probe_access(domain.images, silent(reporter))
        finals = []
        for _ in source.disks:
            image, volume = uuid.uuid4(), uuid.uuid4()
            make_folder(v2vdir, domain.images / str(image), access)
            finals.append(domain.images / str(image) / str(volume))
        disks = replace(self.disks, directory=domain.images, access=access)
        await disks.setup(v2vdir, finals, source.disks, servers)

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the files again, under their hidden names; the export is mounted where it was."""
        refuse_finalized(v2vdir)
        directory = self._directory()
        if nfs.is_export(self.storage):
            directory = await nfs.mount_again(v2vdir, self.storage)
        domain = find_domain(directory, self.storage, silent(reporter))
        access = probe_access(domain.images, silent(reporter))
        disks = replace(self.disks, directory=domain.images, access=access)
        finals = _finals(v2vdir, domain)[: len(source.disks)]
        disks.take_back(v2vdir, finals)
        # The guest's own gets another name the next time.
        remove_folders(v2vdir, reporter, domain.guests)
        problem: str | None = f"setup made {len(finals)} of them"
        if len(finals) == len(source.disks):
            problem = await disks.problem(v2vdir, finals, source.disks)
        if problem is not None:
            reporter.warning(f"the disks are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await disks.serve_again(v2vdir, finals, source.disks, servers)
        return True

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Write the OVF and the .meta files, then give all files their names."""
        directory = nfs.mounted(v2vdir) or self._directory()
        domain = find_domain(directory, self.storage, silent(reporter))
        access = probe_access(domain.images, silent(reporter))
        disks = replace(self.disks, directory=domain.images, access=access)
        finals = _finals(v2vdir, domain)[: len(target.source.disks)]
        if len(finals) < len(target.source.disks):
            raise TargetError(
                f"setup made {len(finals)} disks in ‘{domain.images}’, and the guest has "
                f"{len(target.source.disks)}",
                hint="the output must be set up first, with the same -os",
            )
        volumes = [
            finished_volume(disks, file, disk.size)
            for file, disk in zip(made_disks(v2vdir, finals), target.source.disks, strict=True)
        ]
        vm = str(uuid.uuid4())
        folder = domain.guests / vm
        documents = guest_documents(
            target,
            volumes,
            finals,
            folder / f"{vm}.ovf",
            flavour="rhvexp",
            vm=vm,
            domain=domain.uuid,
            reporter=reporter,
        )
        make_folder(v2vdir, folder, access)
        await disks.publish(v2vdir, finals, documents)
        reporter.message(
            f"the guest is in the export domain as {vm}: import it there (Storage, VM Import)"
        )
        await nfs.unmount(v2vdir, reporter)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what has not got its final name yet, and the folders made for it; unmount."""
        remove_made(v2vdir, reporter)
        await nfs.unmount(v2vdir, reporter)

    def _directory(self) -> Path:
        return Path(self.storage).absolute()

    @asynccontextmanager
    async def _reached(self, reporter: Reporter) -> AsyncIterator[Path]:
        if not nfs.is_export(self.storage):
            yield self._directory()
            return
        async with nfs.mounted_for_a_look(self.storage, reporter) as point:
            yield point

    def _check_room(self, domain: StorageDomain, source: SourceGuest, reporter: Reporter) -> None:
        replace(self.disks, directory=domain.images).check_room(source.disks, reporter)


def _finals(v2vdir: V2VDir, domain: StorageDomain) -> list[Path]:
    """Return what this run makes in the domain's images, the disks first."""
    outputs = [Path(each.final) for each in v2vdir.state.outputs]
    return [final for final in outputs if final.parent.parent == domain.images]


def find_domain(directory: Path, storage: str, reporter: Reporter) -> StorageDomain:
    """Return the export domain in ``directory``; ``storage`` is what -os said.

    Raises:
        TargetError, UsageError: there is none, or it can't take guests.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise UsageError(
            f"-os ‘{storage}’ {what}", hint="give HOST:/EXPORT, or where it is mounted"
        )
    try:
        found = sorted(entry for entry in directory.iterdir() if is_uuid(entry.name))
    except OSError as error:
        raise TargetError(f"-os ‘{storage}’ can't be listed: {error.strerror}") from error
    if not found:
        inside = is_uuid(directory.name) and (directory / "images").is_dir()
        raise TargetError(
            f"there is no storage domain in -os ‘{storage}’: no folder has a UUID for its name",
            hint=f"give the folder above: -os {directory.parent}"
            if inside
            else "is it the export domain that Storage in the engine's web page shows?",
        )
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found)
        raise TargetError(
            f"there are several storage domains in -os ‘{storage}’: {names}",
            hint="an export has one; is it mounted elsewhere?",
        )
    domain = StorageDomain(found[0])
    for folder in (domain.images, domain.guests):
        if not folder.is_dir():
            raise TargetError(
                f"‘{folder}’ is not there",
                hint="attach the export domain to a data center first (Storage, Attach)",
            )
    _check_class(domain, storage, reporter)
    return domain


def _check_class(domain: StorageDomain, storage: str, reporter: Reporter) -> None:
    """Refuse a data or ISO domain: the engine would not see the guest, or trip over it."""
    path = domain.path / "dom_md" / "metadata"
    try:
        # VDSM reads at most so much, too: a block of 4 KiB.
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(4096).splitlines()
    except OSError as error:
        reporter.warning(
            f"‘{path}’ can't be read ({error.strerror}): whether this is an export domain is "
            "not known"
        )
        return
    said = dict(line.split("=", 1) for line in lines if "=" in line)
    kind = said.get("CLASS")
    if kind is not None and kind != "Backup":
        raise TargetError(
            f"-os ‘{storage}’ is a storage domain of the class {kind}, not an export domain",
            hint="upload to a data domain with -o rhv-upload",
        )
    named = said.get("SDUUID")
    if named is not None and named != domain.uuid:
        raise TargetError(f"‘{path}’ is of another domain: {named}")
