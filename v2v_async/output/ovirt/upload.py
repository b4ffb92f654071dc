"""``-o rhv-upload`` (``-o ovirt-upload``): a guest of an oVirt engine, uploaded disk by disk.

::

    engine:   disks ──> transfers ──────────────────────────────> finalize ──> guest (OVF)
    here:               nbdkit (imageio_plugin.py) <── outN <── copy
                          └── HTTPS, or imageio's Unix socket when this is one of its hosts

Raw bytes are sent, also to qcow2 disks: behind imageio a qemu of the host writes the format.

``state.json`` has each disk, transfer and guest before it is made (a transfer: at once after), with
the command that takes it away. What finalize needs besides is in ``out.ovirt.json``. Neither has
the password, the session's token or a transfer's URL, which alone is enough to write to the disk.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import anyio

from v2v_async import nbdkit
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.ovirt import upload_options
from v2v_async.output.ovirt.engine_guest import check_name, find_guest, make_guest
from v2v_async.output.ovirt.guest import check_guest
from v2v_async.output.ovirt.ovf import Volume, losses, ovf
from v2v_async.output.ovirt.session import Session, Site, connected, find_site
from v2v_async.output.ovirt.transfers import (
    NewDisk,
    finalize_transfer,
    has_disk,
    make_disk,
    start_transfer,
    transfer_url,
)
from v2v_async.output.ovirt.upload_record import (
    UploadedDisk,
    for_each,
    read_record,
    write_record,
)
from v2v_async.output.ovirt.upload_undo import DISK, GUEST, TRANSFER, take_back, tell_imageio
from v2v_async.ovirt_engine import EngineError, UncertainError, tls_context
from v2v_async.server import Servers
from v2v_async.units import MIB, format_size
from v2v_async.v2vdir import MadeObject, TargetExport, V2VDir

PLUGIN = Path(__file__).with_name("imageio_plugin.py")

# Each request is one of HTTP and has a price of its own, but is received whole before it is sent.
# Measured (docs/targets-ovirt-upload.md): 256 KiB 0.75 times as fast, 4 MiB 0.55 times.
_REQUEST_SIZE = MIB

# What one bus of oVirt's machines holds, with the CD-ROM that each guest gets; virt-v2v's bound.
_MOST_DISKS = 23


class RhvUploadOutput(Output):
    """A guest of an oVirt engine."""

    name = "rhv-upload"
    option_help = {
        **upload_options.OPTION_HELP,
        **{alias: f"the same as -oo {name}" for alias, name in upload_options.ALIASES.items()},
    }

    def __init__(self, options: upload_options.UploadOptions) -> None:
        self.options = options

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -oc, -op, -os, -of, -oa, -oo and -on."""
        return cls(upload_options.parse(options))

    # Before the conversion.

    async def check(self, reporter: Reporter) -> None:
        """Log in, and look up the storage domain and the cluster."""
        (await nbdkit.probe()).require(plugin="python")
        login = self.options.login
        if not login.verify:
            reporter.warning(
                f"the certificate of ‘{login.address}’ is not checked: whoever is between can read "
                "the password; add -oo rhv-verifypeer"
                + ("" if login.ca_file else " and -oo rhv-cafile=ca.pem")
            )
        tls_context(login.verify, login.ca_file)
        async with connected(login) as session:
            site = await self._site(session)
            self._check_format(site)
            for disk in self.options.disk_ids:
                if await has_disk(session, disk):
                    raise TargetError(
                        f"the engine ‘{login.address}’ has a disk {disk} already",
                        hint="give another -oo rhv-disk-uuid, or leave it out",
                    )

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name, the number and sizes of the disks, and the room there is."""
        self._check_disks(source, name)
        async with connected(self.options.login) as session:
            site = await self._site(session)
            await self._refuse_taken(session, name)
        self._check_room(site, source, reporter)

    def _check_disks(self, source: SourceGuest, name: str) -> None:
        check_name(name)
        check_guest(source, name)
        given = self.options.disk_ids
        if given and len(given) != len(source.disks):
            raise UsageError(
                f"the guest has {len(source.disks)} disks, and -oo rhv-disk-uuid is given "
                f"{len(given)} times",
                hint="give it once for each disk, or not at all",
            )
        if len(source.disks) > _MOST_DISKS:
            raise UsageError(
                f"the guest has {len(source.disks)} disks; -o rhv-upload takes {_MOST_DISKS}"
            )

    def _check_format(self, site: Site) -> None:
        if site.is_block and self.options.format == "raw" and not self.options.is_preallocated:
            raise UsageError(
                f"the storage domain ‘{self.options.storage}’ is block storage (iSCSI or Fibre "
                "Channel), where raw disks can't be sparse",
                hint="add -of qcow2, or -oa preallocated",
            )

    def _check_room(self, site: Site, source: SourceGuest, reporter: Reporter) -> None:
        if site.free is None:
            return
        # On block storage a disk gets all its room at once, too.
        is_fixed = self.options.is_preallocated or site.is_block
        needed = sum(
            disk.size if is_fixed or disk.allocated is None else min(disk.allocated, disk.size)
            for disk in source.disks
        )
        if needed <= site.free:
            return
        has = f"the storage domain ‘{self.options.storage}’ has {format_size(site.free)} left"
        if is_fixed:
            raise TargetError(
                f"{has}, and the disks need {format_size(needed)}",
                hint="free space there, or give another -os NAME",
            )
        reporter.warning(f"{has}; the disks may need {format_size(needed)}")

    async def _refuse_taken(self, session: Session, name: str) -> None:
        taken = await find_guest(session, name)
        if taken is not None:
            raise TargetError(
                f"the engine ‘{self.options.login.address}’ has a guest ‘{name}’ already ({taken})",
                hint="give another name with -on NAME, or remove that guest",
            )

    async def _site(self, session: Session) -> Site:
        options = self.options
        return await find_site(
            session, options.storage, options.cluster, look_for_host=not options.use_proxy
        )

    # The steps.

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make the disks and begin the transfers, all at once; serve each."""
        self._check_disks(source, name)
        marker = f"uploaded by v2v-async, run {secrets.token_hex(8)}"
        ids = self.options.disk_ids or [str(uuid.uuid4()) for _ in source.disks]
        disks = [
            NewDisk(
                disk.index,
                id_,
                f"{name}-{number:03d}",
                disk.size,
                self.options.format,
                self.options.is_preallocated,
                marker,
            )
            # Counted from 0, as virt-v2v does.
            for number, (disk, id_) in enumerate(zip(source.disks, ids, strict=True))
        ]
        transfers: dict[int, tuple[str, str]] = {}
        async with connected(self.options.login) as session:
            site = await self._site(session)
            self._check_format(site)
            self._check_room(site, source, reporter)
            await self._refuse_taken(session, name)
            if v2vdir.metadata_out.exists():
                _check_architecture(site, v2vdir.read_target())

            async def begin(disk: NewDisk) -> None:
                transfers[disk.index] = await self._begin(v2vdir, session, site, disk, reporter)

            await for_each(begin, disks)
        write_record(
            v2vdir,
            [
                UploadedDisk(
                    index=each.index, id=each.id, size=each.size, transfer=transfers[each.index][0]
                )
                for each in disks
            ],
        )

        async def serve(disk: NewDisk) -> None:
            url = transfers[disk.index][1]
            await self._serve(v2vdir, disk, url, servers, is_local=site.host is not None)

        await for_each(serve, disks)
        # A raw disk on block storage is made of what was there before.
        is_zero = not (site.is_block and self.options.format == "raw")
        v2vdir.update(
            targets=[
                TargetExport(index=disk.index, is_known_zero=is_zero, request_size=_REQUEST_SIZE)
                for disk in disks
            ]
        )

    async def _begin(
        self, v2vdir: V2VDir, session: Session, site: Site, disk: NewDisk, reporter: Reporter
    ) -> tuple[str, str]:
        """Make a disk and begin its transfer; return the transfer's id and URL."""
        login = self.options.login
        if await has_disk(session, disk.id):
            raise TargetError(f"the engine ‘{login.address}’ has a disk {disk.id} already")
        made = MadeObject(
            kind=DISK,
            name=f"{disk.id} {disk.description}",
            undo=login.command("DELETE", f"disks/{disk.id}"),
        )
        v2vdir.add_object(made)
        try:
            await make_disk(session, site, disk)
        except EngineError:
            v2vdir.forget_object(made)
            raise
        except UncertainError:
            _warn_of_later(made, reporter)
            raise
        transfer = await start_transfer(session, site, disk.id)
        cancel = login.command("POST", f"imagetransfers/{transfer}/cancel", "<action/>")
        noted = MadeObject(kind=TRANSFER, name=transfer, undo=cancel)
        # Above the disks: who goes by hand through the list can't remove a locked one.
        v2vdir.update(objects=[noted, *v2vdir.state.objects])
        url = await transfer_url(session, transfer, use_proxy=self.options.use_proxy)
        return transfer, url

    async def _serve(
        self, v2vdir: V2VDir, disk: NewDisk, url: str, servers: Servers, *, is_local: bool
    ) -> None:
        transfer = {
            "url": url,
            "size": disk.size,
            "verify": self.options.login.verify,
            "ca_file": self.options.login.ca_file,
            "is_local": is_local,
        }
        path = v2vdir.path / f"transfer{disk.index}.json"
        path.unlink(missing_ok=True)  # of a process that was killed
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(transfer, file)
            command = nbdkit.serve(
                await nbdkit.probe(),
                v2vdir.target_socket(disk.index),
                "python",
                [str(PLUGIN), f"transfer={path}"],
            )
            log = v2vdir.log("output", disk.index)
            await servers.start(f"out{disk.index}", command, log=log)
        except V2VError as error:
            if not self.options.use_proxy and error.hint is None:
                error.hint = (
                    "can oVirt's hosts be reached from here, on port 54322? If not, send the disks "
                    "through the engine: -oo rhv-proxy"
                )
            raise
        finally:
            path.unlink(missing_ok=True)

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Have the engine take the disks, and make the guest: all, or nothing is left."""
        uploaded = read_record(v2vdir, len(target.source.disks))
        try:
            async with connected(self.options.login) as session:
                site = await self._site(session)
                _check_architecture(site, target)
                await self._refuse_taken(session, target.name)

                async def finish(disk: UploadedDisk) -> None:
                    await finalize_transfer(session, disk.transfer, disk.id)

                await for_each(finish, uploaded)
                for text in losses(target):
                    reporter.warning(text)
                vm = await self._make_guest(v2vdir, session, site, target, uploaded, reporter)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.abandon(v2vdir, reporter)
            raise
        kept = [made for made in v2vdir.state.objects if made.kind not in (DISK, TRANSFER, GUEST)]
        v2vdir.update(objects=kept, is_finalized=True)
        reporter.message(
            f"the guest is ‘{target.name}’ ({vm}) in the cluster ‘{self.options.cluster}’"
        )

    async def _make_guest(
        self,
        v2vdir: V2VDir,
        session: Session,
        site: Site,
        target: TargetGuest,
        disks: Sequence[UploadedDisk],
        reporter: Reporter,
    ) -> str:
        vm = str(uuid.uuid4())
        is_preallocated = self.options.is_preallocated
        # The engine finds a disk by its own id. That of the volume is made up, as virt-v2v does.
        volumes = [
            Volume(
                disk.id,
                str(uuid.uuid4()),
                disk.size,
                self.options.format,
                is_preallocated,
                disk.size,
            )
            for disk in disks
        ]
        document = ovf(
            target,
            volumes,
            flavour="ovirt",
            vm=vm,
            domain=site.domain,
            created=time.strftime("%Y/%m/%d %H:%M:%S", time.gmtime()),
        )
        made = MadeObject(
            kind=GUEST,
            name=vm,
            undo=self.options.login.command("DELETE", f"vms/{vm}?detach_only=true"),
        )
        # Guests go first when all is taken back: a disk in use can't be removed.
        v2vdir.update(objects=[made, *v2vdir.state.objects])
        try:
            await make_guest(session, site, vm, document)
        except EngineError:
            v2vdir.forget_object(made)
            raise
        except UncertainError:
            _warn_of_later(made, reporter)
            raise
        return vm

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove the guest, cancel the transfers, remove the disks that this run made."""
        if v2vdir.state.is_finalized:
            return
        tell_imageio(v2vdir, reporter)
        await take_back(self.options.login, v2vdir, reporter)


def _warn_of_later(made: MadeObject, reporter: Reporter) -> None:
    """Say that what we look for and do not find may come after our look."""
    reporter.warning(
        f"the engine may still make the {made.kind} {made.name.partition(' ')[0]}; if it does, "
        f"remove it with: {made.undo}"
    )


def _check_architecture(site: Site, target: TargetGuest) -> None:
    architecture = target.guestcaps.arch
    if site.architecture != architecture:
        raise TargetError(
            f"the cluster ‘{site.cluster_name}’ runs {site.architecture}, and the guest is for "
            f"{architecture}",
            hint="give another one: -oo rhv-cluster=NAME",
        )
