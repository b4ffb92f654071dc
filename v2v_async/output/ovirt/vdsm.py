"""``-o vdsm``: volumes where VDSM wants them, under UUIDs that it has chosen.

VDSM calls virt-v2v so, when the engine's page imports a guest; it has made the image folders
already and reads the OVF afterwards. Files that are there under the final names are replaced.

::

    DOMAIN/images/IMAGE_UUID/VOLUME_UUID(.meta)     OVF_DIR/VM_UUID.ovf
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from v2v_async.errors import TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output, refuse_finalized
from v2v_async.output.file_disks import made_disks
from v2v_async.output.ovirt.access import Access, probe_access
from v2v_async.output.ovirt.guest import check_guest, check_name, guest_documents, is_uuid, silent
from v2v_async.output.ovirt.ovf import Flavour
from v2v_async.output.ovirt.volumes import VolumeDisks, finished_volume, remove_made
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir

_ONCE = ("vdsm-compat", "vdsm-ovf-flavour", "vdsm-ovf-output", "vdsm-vm-uuid")


@dataclass(frozen=True, slots=True)
class VdsmOptions:
    """``-oo vdsm-…``: UUIDs for each disk, in their order, and of the guest."""

    images: tuple[str, ...]
    volumes: tuple[str, ...]
    vm: str
    ovf_directory: Path
    compat: Literal["0.10", "1.1"]
    flavour: Flavour


class VdsmOutput(Output):
    """Volumes and an OVF for VDSM."""

    name = "vdsm"
    option_help = {
        "vdsm-image-uuid": "UUID of a disk's image folder, which must be there; once for each disk",
        "vdsm-vol-uuid": "UUID of a disk's volume; once for each disk",
        "vdsm-vm-uuid": "UUID of the new guest",
        "vdsm-ovf-output": "the directory that the OVF is written to (default: the current one)",
        "vdsm-ovf-flavour": "rhvexp or ovirt: the OVF of export domains (the default), or the "
        "engine's own",
        "vdsm-compat": "0.10 or 1.1: the age of qcow2 that is written (default: 0.10)",
    }

    def __init__(self, disks: VolumeDisks, options: VdsmOptions) -> None:
        self.disks = disks
        self.options = options

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -os, -of, -oa, -on and -oo; refuse -op."""
        if options.password is not None:
            raise UsageError("-o vdsm takes no -op: no password is needed")
        parsed = _parse(options.options)
        if not options.storage:
            raise UsageError(
                "-o vdsm needs the folder of a storage domain",
                hint="add -os /rhev/data-center/POOL_UUID/DOMAIN_UUID",
            )
        if options.name is not None:
            check_name(options.name)
        disks = VolumeDisks.parse(options, "-o vdsm")
        return cls(replace(disks, mode=0o644, compat=parsed.compat), parsed)

    @property
    def domain(self) -> Path:
        """The folder of the storage domain; its name is the domain's UUID."""
        return self.disks.directory.absolute()

    @property
    def finals(self) -> list[Path]:
        """The volumes that -oo names."""
        pairs = zip(self.options.images, self.options.volumes, strict=True)
        return [self.domain / "images" / image / volume for image, volume in pairs]

    @property
    def ovf_path(self) -> Path:
        """Where the OVF goes."""
        return self.options.ovf_directory.absolute() / f"{self.options.vm}.ovf"

    async def check(self, reporter: Reporter) -> None:
        """Check the domain, the folders that VDSM has made, and that they can be written."""
        await self.disks.check()
        if not is_uuid(self.domain.name):
            raise UsageError(
                f"-os ‘{self.domain}’ is not the folder of a storage domain, whose name is a UUID",
                hint="-os /rhev/data-center/POOL_UUID/DOMAIN_UUID",
            )
        for number, final in enumerate(self.finals):
            if not final.parent.is_dir():
                raise TargetError(
                    f"the image folder ‘{final.parent}’ is not there",
                    hint="VDSM makes it; by hand: mkdir, and chown 36:36",
                )
            probe_access(final.parent, reporter if number == 0 else silent(reporter))
        folder = self.ovf_path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            what = "can't be written" if folder.is_dir() else "is not a directory"
            raise UsageError(f"-oo vdsm-ovf-output ‘{folder}’ {what}", hint="name another one")

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the number of disks, the files that will be replaced, and the room there is."""
        check_guest(source, name)
        if len(source.disks) != len(self.options.images):
            raise UsageError(
                f"the guest has {len(source.disks)} disks, and -oo names "
                f"{len(self.options.images)} images",
                hint="give -oo vdsm-image-uuid and -oo vdsm-vol-uuid once for each disk",
            )
        for final in self.finals:
            if final.exists() and not final.is_file():
                raise TargetError(
                    f"‘{final}’ is no file: block storage domains can't be written this way",
                    hint="use -o rhv-upload",
                )
        metas = [final.with_name(f"{final.name}.meta") for final in self.finals]
        self.disks.check_finals([*self.finals, *metas, self.ovf_path], source.disks)
        self.disks.check_room(source.disks, reporter)

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make empty disks under hidden names in VDSM's folders, and serve them."""
        await self.check_source(source, name, reporter)
        disks = replace(self.disks, access=self._access(reporter))
        await disks.setup(v2vdir, self.finals, source.disks, servers)

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the files again, under their hidden names."""
        refuse_finalized(v2vdir)
        disks = replace(self.disks, access=self._access(reporter))
        disks.take_back(v2vdir, self.finals)
        problem = await disks.problem(v2vdir, self.finals, source.disks)
        if problem is not None:
            reporter.warning(f"the disks are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await disks.serve_again(v2vdir, self.finals, source.disks, servers)
        return True

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Write the OVF and the .meta files, then give all files their names."""
        disks = replace(self.disks, access=self._access(reporter))
        volumes = [
            finished_volume(disks, file, disk.size)
            for file, disk in zip(made_disks(v2vdir, self.finals), target.source.disks, strict=True)
        ]
        documents = guest_documents(
            target,
            volumes,
            self.finals,
            self.ovf_path,
            flavour=self.options.flavour,
            vm=self.options.vm,
            domain=self.domain.name,
            reporter=reporter,
        )
        await disks.publish(v2vdir, self.finals, documents)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what has not got its final name yet; VDSM's folders stay."""
        remove_made(v2vdir, reporter)

    def _access(self, reporter: Reporter) -> Access:
        access = probe_access(self.finals[0].parent, silent(reporter))
        # The folders are VDSM's, and their mode too: who can't rename in them as it is can't.
        return Access("plain") if access.kind == "switch" else access


def _parse(options: Sequence[tuple[str, str | None]]) -> VdsmOptions:
    values: dict[str, list[str]] = {name: [] for name in VdsmOutput.option_help}
    for name, value in options:
        if name not in values:
            raise UsageError(
                f"-o vdsm has no option ‘-oo {name}’", hint=f"it has: {', '.join(values)}"
            )
        if not value:
            raise UsageError(f"-oo {name}: nothing given", hint=f"write -oo {name}=…")
        if name in _ONCE and values[name]:
            raise UsageError(f"-oo {name} is given twice", hint="keep one")
        if name.endswith("-uuid"):
            if not is_uuid(value):
                raise UsageError(
                    f"-oo {name}={value} is not a UUID",
                    hint="write it as 12345678-1234-1234-1234-123456789abc",
                )
            if value in values[name]:
                raise UsageError(f"-oo {name}={value} is given twice", hint="each disk has its own")
        values[name].append(value)
    images, volumes = values["vdsm-image-uuid"], values["vdsm-vol-uuid"]
    for name in ("vdsm-image-uuid", "vdsm-vol-uuid", "vdsm-vm-uuid"):
        if not values[name]:
            raise UsageError(f"-o vdsm needs -oo {name}", hint=VdsmOutput.option_help[name])
    if len(images) != len(volumes):
        raise UsageError(
            f"-oo vdsm-image-uuid is given {len(images)} times, -oo vdsm-vol-uuid {len(volumes)}",
            hint="give both once for each disk",
        )
    compat = (values["vdsm-compat"] or ["0.10"])[0]
    flavour = (values["vdsm-ovf-flavour"] or ["rhvexp"])[0]
    if compat not in ("0.10", "1.1"):
        raise UsageError(f"-oo vdsm-compat={compat}: write 0.10 or 1.1")
    if flavour not in ("rhvexp", "ovirt"):
        raise UsageError(f"-oo vdsm-ovf-flavour={flavour}: write rhvexp or ovirt")
    return VdsmOptions(
        tuple(images),
        tuple(volumes),
        values["vdsm-vm-uuid"][0],
        Path((values["vdsm-ovf-output"] or ["."])[0]),
        "1.1" if compat == "1.1" else "0.10",
        "ovirt" if flavour == "ovirt" else "rhvexp",
    )
