"""``-o openstack``: a Cinder volume of each disk, written while attached to this machine.

::

    setup:     volume created ──> attached to the server that this runs in ──> /dev/disk/by-id/…
    (copy)     nbdkit serves the device
    finalize:  detached ──> image properties, bootable ──> name and properties that say what it is
               any failure: detached, deleted

A volume's id is Cinder's choice. So that one is found whose id was lost on the way (the connection
broke after it was made), it carries a mark that is in ``state.json`` before it is asked for.
"""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import anyio
import anyio.lowlevel

from v2v_async import __version__, nbdkit
from v2v_async.errors import TargetError, UsageError, most_telling
from v2v_async.events import Reporter
from v2v_async.model import SourceDisk, SourceGuest, TargetGuest
from v2v_async.openstack_cloud import Cloud, CloudError, Login, connected
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.contract import Output, refuse_finalized
from v2v_async.output.openstack import volumes
from v2v_async.output.openstack.login import VISIBLE, is_on_the_command_line, parse_login
from v2v_async.output.openstack.login_options import LOGIN_HELP, VOLUME_HELP
from v2v_async.output.openstack.properties import check_name, image_properties, remarks
from v2v_async.output.openstack.undo import remove_made
from v2v_async.server import Servers
from v2v_async.units import drive_letters, format_size
from v2v_async.v2vdir import MadeObject, TargetExport, V2VDir

_BY_ID = Path("/dev/disk/by-id")
_VOLUME = "volume of disk "
_UNKNOWN = "volume with an unknown id, of disk "
_PRODUCT = Path("/sys/class/dmi/id/product_uuid")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where volumes are made, and where they appear."""

    server: str
    type: str | None = None
    zone: str | None = None
    guest_id: str | None = None
    devices: Path = _BY_ID


class OpenstackOutput(Output):
    """Volumes of Cinder."""

    name = "openstack"
    option_help = {**VOLUME_HELP, **LOGIN_HELP}

    def __init__(self, login: Login, place: _Place, *, is_visible: bool = False) -> None:
        self.login = login
        self.place = place
        self._is_visible = is_visible

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -oo, -os (the volume type), -on; refuse -of and -oa but for what is done anyway."""
        login = parse_login(options, cls.option_help)
        if options.format not in (None, "raw"):
            raise UsageError(
                f"-of {options.format}: -o openstack writes raw", hint="volumes have no format"
            )
        if options.allocation != "sparse":
            raise UsageError(
                "-o openstack takes no -oa preallocated", hint="that is the volume type's: -os TYPE"
            )
        if options.storage == "":
            raise UsageError("-os is empty", hint="name a volume type: openstack volume type list")
        place = _Place("", type=options.storage)
        for option, value in options.options:
            if option not in VOLUME_HELP:
                continue
            if not value:
                raise UsageError(f"-oo {option} needs a value", hint=f"-oo {option}=VALUE")
            match option:
                case "server-id":
                    place = replace(place, server=value)
                case "guest-id":
                    place = replace(place, guest_id=_checked_guest_id(value))
                case "availability-zone":
                    place = replace(place, zone=value)
                case "dev-disk-by-id":
                    place = replace(place, devices=Path(value).absolute())
        if not place.server:
            raise UsageError(
                "-o openstack has to know which server it runs in: volumes are attached to it",
                hint="add -oo server-id=NAME|UUID; openstack server list",
            )
        if options.name is not None:
            check_name(options.name, "-sda")
        return cls(login, place, is_visible=is_on_the_command_line(options))

    # Before the conversion.

    async def check(self, reporter: Reporter) -> None:
        """Log in; find the server and the volume type; see that devices can be served."""
        if self._is_visible:
            reporter.warning(VISIBLE)
        (await nbdkit.probe()).require(plugin="file")
        if self.place.devices != _BY_ID and not self.place.devices.is_dir():
            raise UsageError(f"-oo dev-disk-by-id=‘{self.place.devices}’ is not a directory")
        async with connected(self.login) as cloud:
            await cloud.log_in()
            server = await volumes.find_server(cloud, self.place.server)
            if self.place.devices == _BY_ID:
                _warn_of_another_machine(server, reporter)
            if self.place.type is not None:
                await volumes.check_type(cloud, self.place.type)
            await volumes.check_quota(cloud, [])

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name and the quota."""
        names = volume_names(name, len(source.disks))
        check_name(name, names[-1][len(name) :])
        async with connected(self.login) as cloud:
            sizes = [volumes.size_in_gib(disk.size) for disk in source.disks]
            await volumes.check_quota(cloud, sizes)
            for each in names:
                found = cloud.pages("block-storage", "/volumes", "volumes", {"name": each})
                async for other in found:
                    if other.get("name") == each:
                        reporter.warning(
                            f"there is a volume ‘{each}’ already ({other['id']}): two of a name "
                            "can only be told apart by their ids; another name: -on NAME"
                        )

    # The steps.

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make the volumes, attach them to this machine, and serve their devices."""
        names = volume_names(name, len(source.disks))
        check_name(name, names[-1][len(name) :])
        devices = []
        async with connected(self.login) as cloud:
            server = await volumes.find_server(cloud, self.place.server)
            made = []
            for disk, volume_name in zip(source.disks, names, strict=True):
                made.append(await self._create(cloud, v2vdir, server, disk, volume_name, name))
            for disk, volume in zip(source.disks, made, strict=True):
                await volumes.wait_for(cloud, volume, "available", ("creating", "downloading"))
                await volumes.attach(cloud, server, volume)
                device = await volumes.wait_for_device(volume, self.place.devices, server)
                _check_device(device, disk)
                reporter.message(f"disk {disk.index} is the volume {volume}, here ‘{device}’")
                devices.append(device)
        await self._serve(v2vdir, source, devices, servers)

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the volumes again, attached anew where they are not any more.

        Raises:
            V2VError: the cloud does not answer, or does not attach one.
        """
        refuse_finalized(v2vdir)
        made = _made(v2vdir)
        problem = None
        async with connected(self.login) as cloud:
            server = await volumes.find_server(cloud, self.place.server)
            devices = []
            for disk in source.disks:
                found = await self._find(cloud, server, made.get(disk.index), disk)
                if isinstance(found, str):
                    problem = found
                    break
                devices.append(found)
        if problem is not None:
            reporter.warning(f"the volumes are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await self._serve(v2vdir, source, devices, servers)
        return True

    async def _find(
        self, cloud: Cloud, server: volumes.Server, made: MadeObject | None, disk: SourceDisk
    ) -> Path | str:
        """Return the device of a volume that setup made, attached; or why that can't be had."""
        if made is None:
            return f"setup made no volume for disk {disk.index}"
        status = await volumes.status_of(cloud, made.name)
        if status in ("available", "detaching"):
            # Detached by finalize, or about to be.
            await volumes.wait_for(cloud, made.name, "available", ("detaching",))
            await volumes.attach(cloud, server, made.name)
        elif status in ("reserved", "attaching"):
            await volumes.wait_for(cloud, made.name, "in-use", (status, "attaching"))
        elif status != "in-use":
            how = "is not there any more" if status is None else f"is ‘{status}’"
            return f"the volume {made.name} of disk {disk.index} {how}"
        device = await volumes.wait_for_device(made.name, self.place.devices, server)
        _check_device(device, disk)
        return device

    async def _serve(
        self, v2vdir: V2VDir, source: SourceGuest, devices: Sequence[Path], servers: Servers
    ) -> None:
        features = await nbdkit.probe()
        for disk, device in zip(source.disks, devices, strict=True):
            socket = v2vdir.target_socket(disk.index)
            command = nbdkit.serve_target_file(features, device, socket)
            log = v2vdir.log("output", disk.index)
            await servers.start(f"out{disk.index}", command, log=log)
        # Not every back end gives volumes that read as zeroes.
        v2vdir.update(targets=[TargetExport(index=disk.index) for disk in source.disks])

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Detach the volumes and say of each what it is: all of them, or none is left."""
        made = _made(v2vdir)
        missing = [disk.index for disk in target.source.disks if disk.index not in made]
        if missing:
            raise TargetError(
                f"disk {missing[0]} has no volume",
                hint="the output must be set up first, and finalized once",
            )
        try:
            for each in made.values():
                device = volumes.device_of(each.name, self.place.devices)
                if device is not None:
                    await files.sync(device)
            async with connected(self.login) as cloud:
                server = await volumes.find_server(cloud, self.place.server)
                async with anyio.create_task_group() as tasks:
                    for each in made.values():
                        tasks.start_soon(volumes.detach, cloud, server.id, each.name)
                boot = made[target.boot_disk or target.source.disks[0].index].name
                await _make_bootable(cloud, boot, target)
                for position, disk in enumerate(target.source.disks, start=1):
                    await self._describe(cloud, made[disk.index].name, position, target)
            await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.abandon(v2vdir, reporter)
            if isinstance(error, BaseExceptionGroup):
                told = most_telling(error)
                raise told from told.__cause__
            raise
        gone = list(made.values())
        kept = [each for each in v2vdir.state.objects if each not in gone]
        v2vdir.update(objects=kept, is_finalized=True)
        set_property = self.login.command("volume", "set", "--image-property", "PROPERTY", boot)
        for remark in remarks(target, set_property):
            reporter.warning(remark)
        words = ("server", "create", "--flavor", "FLAVOR", "--volume", boot, target.name)
        reporter.message(f"boot it with: {self.login.command(*words)}")

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Detach and delete the volumes that this run made."""

        async def remove(cloud: Cloud, made: MadeObject) -> None:
            if made.kind.startswith(_VOLUME):
                await volumes.remove(cloud, made.name)
                return
            found = await volumes.find_marked(cloud, made.name)
            for volume in found:
                await volumes.remove(cloud, volume)
            if not found:
                raise TargetError("Cinder has none yet, and may still make it")

        await remove_made(v2vdir, self.login, (_VOLUME, _UNKNOWN), remove, reporter)

    # What they consist of.

    async def _create(
        self,
        cloud: Cloud,
        v2vdir: V2VDir,
        server: volumes.Server,
        disk: SourceDisk,
        volume_name: str,
        name: str,
    ) -> str:
        """Ask for a volume and note its id; whatever happens, ``state.json`` leads to it."""
        mark = str(uuid.uuid4())
        asked = MadeObject(
            kind=f"{_UNKNOWN}{disk.index}",
            name=mark,
            undo=self.login.command("volume", "list", "--property", f"{volumes.MARK}={mark}"),
        )
        fields = {
            "name": volume_name,
            "description": f"temporary volume of v2v-async for {name}"[:255],
            "size": volumes.size_in_gib(disk.size),
            "volume_type": self.place.type,
            "availability_zone": self.place.zone,
            "metadata": {volumes.MARK: mark},
        }
        v2vdir.add_object(asked)
        # The call ends by itself: we have to know how.
        with anyio.CancelScope(shield=True):
            try:
                volume = await volumes.create(cloud, fields)
            except CloudError as error:
                # Refused is refused; only silence, and a service that broke, leave it open.
                if error.status is not None and error.status < 500:
                    v2vdir.forget_object(asked)
                error.locate(disk=disk.index)
                raise
            undo = "; ".join(
                self.login.command(*words)
                for words in (
                    ("server", "remove", "volume", server.id, volume),
                    ("volume", "delete", volume),
                )
            )
            known = MadeObject(kind=f"{_VOLUME}{disk.index}", name=volume, undo=undo)
            objects = v2vdir.state.objects
            v2vdir.update(objects=[known if each == asked else each for each in objects])
        await anyio.lowlevel.checkpoint()
        return volume

    async def _describe(
        self, cloud: Cloud, volume: str, position: int, target: TargetGuest
    ) -> None:
        """Give a volume the properties that virt-v2v gives, in place of its mark."""
        index = f"{position}/{len(target.source.disks)}"
        now = datetime.now(UTC)
        properties = {
            "virt_v2v_version": f"v2v-async {__version__}",
            "virt_v2v_conversion_date": now.strftime("%Y/%m/%d %H:%M:%S"),
            "virt_v2v_guest_name": target.name,
            "virt_v2v_disk_index": index,
        }
        if target.source.genid:
            properties["virt_v2v_vm_generation_id"] = target.source.genid
        if self.place.guest_id:
            properties["virt_v2v_guest_id"] = self.place.guest_id
        path = f"/volumes/{volume}"
        await cloud.call("block-storage", "PUT", f"{path}/metadata", body={"metadata": properties})
        description = f"{target.name} disk {index} converted by v2v-async"[:255]
        await cloud.call(
            "block-storage", "PUT", path, body={"volume": {"description": description}}
        )


def _made(v2vdir: V2VDir) -> dict[int, MadeObject]:
    """Return the volumes that setup made, by disk."""
    return {
        int(each.kind.removeprefix(_VOLUME)): each
        for each in v2vdir.state.objects
        if each.kind.startswith(_VOLUME)
    }


async def _make_bootable(cloud: Cloud, volume: str, target: TargetGuest) -> None:
    path = f"/volumes/{volume}/action"
    properties = {"os-set_image_metadata": {"metadata": image_properties(target)}}
    await cloud.call("block-storage", "POST", path, body=properties)
    await cloud.call("block-storage", "POST", path, body={"os-set_bootable": {"bootable": True}})


def volume_names(name: str, count: int) -> list[str]:
    """Return the volumes' names as virt-v2v gives them: ``NAME-sda``, ``NAME-sdb`` …"""
    return [f"{name}-sd{drive_letters(position)}" for position in range(count)]


def _checked_guest_id(value: str) -> str:
    if len(value) > 255:
        raise UsageError("-oo guest-id has more than 255 characters, which Cinder refuses")
    return value


def _check_device(device: Path, disk: SourceDisk) -> None:
    """See that a device can be written, belongs to nobody here, and is large enough.

    Raises:
        TargetError
    """
    try:
        # O_EXCL: the kernel refuses a device that is mounted or belongs to another one.
        exclusive = os.O_EXCL if stat.S_ISBLK(device.stat().st_mode) else 0
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as error:
        raise TargetError(
            f"‘{device}’ can't be written: {error.strerror}",
            hint="run it as root: volumes are block devices here"
            if os.geteuid() != 0
            else "is something here using it? lsblk",
        ) from error
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
    if size < disk.size:
        raise TargetError(
            f"‘{device}’ has {format_size(size)}, and disk {disk.index} has "
            f"{format_size(disk.size)}"
        )


def _warn_of_another_machine(server: volumes.Server, reporter: Reporter) -> None:
    """Compare with the UUID that Nova gives to its machines, where the firmware tells it."""
    try:
        here = _PRODUCT.read_text().strip().lower()
    except OSError:  # only root may read it; not every machine has it
        return
    if here != server.id.lower():
        reporter.warning(
            f"this machine is not the server ‘{server.name}’ ({server.id}), it seems: its UUID is "
            f"{here}. Volumes attached to another one will not appear here"
        )
