"""``-o glance``: an image of each disk in Glance.

::

    setup: a scratch disk in the v2v directory ──(copy)──> finalize: image made ──> uploaded
                                                  on failure: images deleted <────────┴─> active

Glance takes an image as one stream whose format and size it is told first, and a converted disk is
written here and there, so it goes through a file. The id of an image is chosen here and noted in
``state.json`` before the image is made: there is no moment at which one could be left unnoticed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import anyio
import anyio.lowlevel

from v2v_async import nbdkit
from v2v_async.errors import TargetError, UsageError, V2VError, most_telling
from v2v_async.events import Bytes, Reporter
from v2v_async.model import SourceDisk, SourceGuest, TargetGuest
from v2v_async.openstack_cloud import Cloud, CloudError, Login, connected
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.contract import Output, refuse_finalized
from v2v_async.output.file_disks import COMPRESSED_HELP, FileDisks, made_disks
from v2v_async.output.openstack.login import VISIBLE, is_on_the_command_line, parse_login
from v2v_async.output.openstack.login_options import LOGIN_HELP
from v2v_async.output.openstack.properties import check_name, image_properties, remarks
from v2v_async.output.openstack.undo import remove_made
from v2v_async.server import Servers
from v2v_async.units import GIB, MIB, format_size
from v2v_async.v2vdir import MadeObject, V2VDir, default_parent

_IMAGE = "image"
# One stream seldom fills a network; more than a few only share it.
_UPLOADS = 4
_TELL_S = 10.0
_ROOM = "free space there, or set TMPDIR to a directory that has more"


@dataclass(frozen=True, slots=True)
class _Image:
    """An image to be: a disk's scratch file, and what Glance is told of it."""

    id: str
    name: str
    disk: SourceDisk
    scratch: Path


class GlanceOutput(Output):
    """Images of Glance."""

    name = "glance"
    option_help = {"compressed": COMPRESSED_HELP, **LOGIN_HELP}

    def __init__(self, login: Login, disks: FileDisks, *, is_visible: bool = False) -> None:
        self.login = login
        # Their directory is the v2v directory, once there is one.
        self._disks = disks
        self._is_visible = is_visible

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check -of, -oa, -oo, -on; -oc and -op belong to the login."""
        if options.storage is not None:
            raise UsageError("-o glance takes no -os", hint="leave it out; Glance has no places")
        login = parse_login(options, cls.option_help)
        disks = FileDisks.parse(replace(options, storage=str(default_parent())), "-o glance")
        if options.name is not None:
            check_name(options.name, "")
        return cls(login, disks, is_visible=is_on_the_command_line(options))

    # Before the conversion.

    async def check(self, reporter: Reporter) -> None:
        """Log in, and see that Glance answers and takes the format."""
        if self._is_visible:
            reporter.warning(VISIBLE)
        (await nbdkit.probe()).require(plugin="file")
        async with connected(self.login) as cloud:
            await cloud.log_in()
            schema = await cloud.call("image", "GET", "/schemas/image")
            formats = schema.get("properties", {}).get("disk_format", {}).get("enum") or []
            if formats and self._disks.format not in formats:
                known = ", ".join(str(each) for each in formats if each)
                raise TargetError(
                    f"this cloud's Glance takes no {self._disks.format} images",
                    hint=f"choose another -of; it takes {known}",
                )

    async def check_source(self, source: SourceGuest, name: str, reporter: Reporter) -> None:
        """Check the name, the scratch space, and the quota as far as Glance tells it."""
        self._check_guest(source, name, default_parent(), reporter)
        async with connected(self.login) as cloud:
            for image in image_names(name, len(source.disks)):
                async for other in cloud.pages("image", "/images", "images", {"name": image}):
                    reporter.warning(
                        f"there is an image ‘{image}’ already ({other['id']}): two of a name can "
                        "only be told apart by their ids; another name: -on NAME"
                    )
            await self._check_quota(cloud, source)

    def _check_guest(
        self, source: SourceGuest, name: str, directory: Path, reporter: Reporter
    ) -> None:
        last = image_names(name, len(source.disks))[-1]
        check_name(name, last.removeprefix(name))
        free = files.free_space(directory)
        needed = sum(
            disk.size
            if self._disks.is_preallocated or disk.allocated is None
            else min(disk.allocated, disk.size)
            for disk in source.disks
        )
        if needed <= free:
            return
        text = (
            f"‘{directory}’ has {format_size(free)} left; the disks, which are kept there until "
            f"they are uploaded, may need {format_size(needed)}"
        )
        if self._disks.is_preallocated:
            raise TargetError(text, hint=_ROOM)
        reporter.warning(text)

    async def _check_quota(self, cloud: Cloud, source: SourceGuest) -> None:
        try:
            usage = (await cloud.call("image", "GET", "/info/usage")).get("usage", {})
        except CloudError as error:
            # Older than Xena; nor need everybody be allowed to see it.
            if error.status in (403, 404):
                return
            raise
        _refuse_beyond(usage, "image_count_total", len(source.disks), "images")
        least = sum(disk.allocated or 0 for disk in source.disks)
        if self._disks.format == "raw":
            least = sum(disk.size for disk in source.disks)
        _refuse_beyond(usage, "image_size_total", least // MIB, "MiB of images")

    # The steps.

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make empty scratch disks in the v2v directory and serve them."""
        self._check_guest(source, name, v2vdir.path, reporter)
        if self._disks.format == "raw":
            total = format_size(sum(disk.size for disk in source.disks))
            reporter.message(
                f"raw images are uploaded with all their zeroes, {total}: -of qcow2 sends less"
            )
        disks = replace(self._disks, directory=v2vdir.path)
        try:
            await disks.setup(v2vdir, _scratch(v2vdir, source.disks), source.disks, servers)
        except TargetError as error:
            error.hint = _ROOM
            raise

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the scratch disks again; images of an upload that was cut short are deleted."""
        refuse_finalized(v2vdir)
        await self._delete_images(v2vdir, reporter)
        disks = replace(self._disks, directory=v2vdir.path)
        scratch = _scratch(v2vdir, source.disks)
        problem = await disks.problem(v2vdir, scratch, source.disks)
        if problem is not None:
            reporter.warning(f"the disks are made and copied anew: {problem}")
            return await self.start_over(v2vdir, source, name, servers, reporter)
        await disks.serve_again(v2vdir, scratch, source.disks, servers)
        return True

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Make the images and upload the disks, all of them, or nothing is left in Glance."""
        images = self._images(v2vdir, target)
        properties = image_properties(target)
        made = [
            MadeObject(
                kind=_IMAGE, name=each.id, undo=self.login.command("image", "delete", each.id)
            )
            for each in images
        ]
        try:
            async with connected(self.login) as cloud:
                await cloud.log_in()
                v2vdir.update(objects=[*v2vdir.state.objects, *made])
                limiter = anyio.CapacityLimiter(_UPLOADS)
                async with anyio.create_task_group() as tasks:
                    for image in images:
                        tasks.start_soon(
                            self._make, cloud, limiter, image, target, properties, reporter
                        )
            await anyio.lowlevel.checkpoint()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._delete_images(v2vdir, reporter)
            if isinstance(error, BaseExceptionGroup):
                told = most_telling(error)
                raise told from told.__cause__
            raise
        kept = [each for each in v2vdir.state.objects if each not in made]
        v2vdir.update(objects=kept, is_finalized=True)
        for image in images:
            image.scratch.unlink(missing_ok=True)
        words = ("image", "set", "--property", "PROPERTY", images[0].id)
        for remark in remarks(target, self.login.command(*words)):
            reporter.warning(remark)
        for image in images:
            reporter.message(f"disk {image.disk.index} is the image ‘{image.name}’ ({image.id})")

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove the scratch disks, and delete the images that this run made."""
        files.remove_temporary(v2vdir.state.outputs)
        await self._delete_images(v2vdir, reporter)

    # What they consist of.

    def _images(self, v2vdir: V2VDir, target: TargetGuest) -> list[_Image]:
        disks = target.source.disks
        check_name(target.name, image_names(target.name, len(disks))[-1][len(target.name) :])
        made = made_disks(v2vdir, _scratch(v2vdir, disks))
        names = image_names(target.name, len(disks))
        return [
            _Image(str(uuid.uuid4()), name, disk, Path(file.temporary))
            for disk, name, file in zip(disks, names, made, strict=True)
        ]

    async def _make(
        self,
        cloud: Cloud,
        limiter: anyio.CapacityLimiter,
        image: _Image,
        target: TargetGuest,
        properties: Mapping[str, str],
        reporter: Reporter,
    ) -> None:
        """Make one image, and have it uploaded and active."""
        mine = reporter.for_disk(image.disk.index)
        try:
            async with limiter:
                await self._create(cloud, image, target, properties)
                await self._upload(cloud, image, mine)
        except V2VError as error:
            error.locate(disk=image.disk.index)
            raise

    async def _create(
        self, cloud: Cloud, image: _Image, target: TargetGuest, properties: Mapping[str, str]
    ) -> None:
        body = {
            **properties,
            "id": image.id,
            "name": image.name,
            "disk_format": self._disks.format,
            "container_format": "bare",
            "min_ram": target.source.memory // MIB,
            "min_disk": -(-image.disk.size // GIB),
        }
        await cloud.call("image", "POST", "/images", body=body)

    async def _upload(self, cloud: Cloud, image: _Image, reporter: Reporter) -> None:
        try:
            total = image.scratch.stat().st_size
            reporter.emit("started")
            reporter.message(f"uploading {format_size(total)} to Glance")
            told = anyio.current_time()

            def tell(sent: int) -> None:
                nonlocal told
                landed = Bytes(total=total, data=total, copied=min(sent, total))
                reporter.emit("progress", bytes=landed)
                # Screens show the progress of copies only.
                if sent < total and anyio.current_time() - told > _TELL_S:
                    told = anyio.current_time()
                    reporter.message(f"{format_size(sent)} of {format_size(total)} uploaded")

            digest = await cloud.upload("image", f"/images/{image.id}/file", image.scratch, tell)
        except OSError as error:
            raise files.target_error("read", image.scratch, error) from error
        found = await cloud.call("image", "GET", f"/images/{image.id}")
        if found.get("status") != "active":
            raise TargetError(f"the image {image.id} is {found.get('status')} after its upload")
        if found.get("size") != total or not _is_same(found, digest):
            raise TargetError(
                f"what Glance has of the image {image.id} is not what was sent",
                hint="look at its store, then try again",
            )
        reporter.emit("finished", bytes=Bytes(total=total, data=total, copied=total))

    async def _delete_images(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        await remove_made(v2vdir, self.login, (_IMAGE,), _delete, reporter)


async def _delete(cloud: Cloud, made: MadeObject) -> None:
    """Delete an image, waiting while something is done with it.

    Raises:
        CloudError: it stays.
    """
    while True:
        try:
            await cloud.call("image", "DELETE", f"/images/{made.name}", is_given_up=True)
        except CloudError as error:
            if error.status in (404, 410):
                return
            if error.status != 409:
                raise
            await anyio.sleep(1)
        else:
            return


def image_names(name: str, count: int) -> list[str]:
    """Return the images' names as virt-v2v gives them: ``NAME``, ``NAME-disk2``, ``NAME-disk3``."""
    return [name, *(f"{name}-disk{index}" for index in range(2, count + 1))]


def _scratch(v2vdir: V2VDir, disks: Sequence[SourceDisk]) -> list[Path]:
    return [v2vdir.path / f"disk{disk.index}" for disk in disks]


def _is_same(found: Mapping[str, Any], digest: str) -> bool:
    # The algorithm is the cloud's choice; another one than its default is not worth a second look.
    return found.get("os_hash_algo") != "sha512" or found.get("os_hash_value") in (None, digest)


def _refuse_beyond(usage: Mapping[str, Any], key: str, wanted: int, unit: str) -> None:
    entry = usage.get(key) or {}
    limit, used = entry.get("limit", -1), entry.get("usage", 0)
    if limit >= 0 and used + wanted > limit:
        raise TargetError(
            f"the quota of the project is {limit} {unit}; {used} are used, and the guest needs "
            f"{wanted} more",
            hint="delete images, or ask for more: openstack quota show",
        )
