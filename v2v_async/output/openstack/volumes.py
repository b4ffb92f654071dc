"""Cinder's volumes, attached to the conversion appliance by Nova: the requests, and the waiting.

::

    creating ──> available ──> attaching ──> in-use ──(copy)──> detaching ──> available
                                               └ /dev/disk/by-id/virtio-ID appears in the appliance
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio

from v2v_async.errors import TargetError, UsageError
from v2v_async.openstack_cloud import Cloud, CloudError
from v2v_async.units import GIB

# virt-v2v waits as long: some back ends write all of a new volume first.
TIMEOUT_S = 300.0
_FIRST_POLL_S, _LAST_POLL_S = 0.1, 2.0
# virtio-blk's serial number has room for 20 characters of a volume's id, other devices for more.
_SERIAL = 20
_PARTITION = re.compile(r"-part[0-9]+")
MARK = "v2v_async_id"
"""The property by which a volume is found whose id never reached us."""


@dataclass(frozen=True, slots=True)
class Server:
    """The conversion appliance, as Nova knows it."""

    id: str
    name: str


async def find_server(cloud: Cloud, given: str) -> Server:
    """Return the server with this id, or this name.

    Raises:
        UsageError, TargetError: there is none, or several, or it does not run.
    """
    found: list[dict[str, Any]] = []
    try:
        answer = await cloud.call("compute", "GET", f"/servers/{quote(given, safe='')}")
        found = [answer["server"]]
    except CloudError as error:
        if error.status not in (400, 404):
            raise
    if not found:
        # Nova takes the name for a regular expression.
        parameters = {"name": f"^{re.escape(given)}$"}
        found = [
            each
            async for each in cloud.pages("compute", "/servers/detail", "servers", parameters)
            if each.get("name") == given
        ]
    if not found:
        raise UsageError(
            f"-oo server-id={given}: there is no such server in this project",
            hint="name the server that this runs in: openstack server list",
        )
    if len(found) > 1:
        ids = ", ".join(str(each["id"]) for each in found)
        raise UsageError(
            f"-oo server-id={given}: {len(found)} servers have that name", hint=f"give an id: {ids}"
        )
    [server] = found
    if server.get("status") != "ACTIVE":
        raise TargetError(
            f"the server ‘{server.get('name')}’ is {server.get('status')}: volumes attached to it "
            "would not appear here",
            hint="-oo server-id names the server that this runs in: openstack server list",
        )
    return Server(server["id"], server.get("name") or given)


async def check_type(cloud: Cloud, type_: str) -> None:
    """See that there is a volume type of that name or id.

    Raises:
        UsageError: there is none.
    """
    types = [each async for each in cloud.pages("block-storage", "/types", "volume_types", {})]
    if not any(type_ in (each.get("id"), each.get("name")) for each in types):
        names = ", ".join(sorted(str(each.get("name")) for each in types)) or "none at all"
        raise UsageError(f"-os {type_}: there is no such volume type", hint=f"there are: {names}")


async def check_quota(cloud: Cloud, sizes: list[int]) -> None:
    """See that the project may have volumes of these sizes (GiB).

    Raises:
        TargetError: it may not.
    """
    try:
        answer = await cloud.call("block-storage", "GET", "/limits")
    except CloudError as error:
        if error.status in (403, 404):  # hidden from us: creating them will tell
            return
        raise
    limits = answer.get("limits", {}).get("absolute", {})
    for most, used, wanted, unit in (
        ("maxTotalVolumes", "totalVolumesUsed", len(sizes), "volumes"),
        ("maxTotalVolumeGigabytes", "totalGigabytesUsed", sum(sizes), "GiB of volumes"),
    ):
        limit = limits.get(most, -1)
        if limit >= 0 and limits.get(used, 0) + wanted > limit:
            raise TargetError(
                f"the quota of the project is {limit} {unit}; {limits.get(used, 0)} are used, and "
                f"the guest needs {wanted} more",
                hint="delete volumes, or ask for more: openstack quota show",
            )


def size_in_gib(size: int) -> int:
    """Return the size of the volume for a disk of ``size`` bytes: Cinder counts in GiB."""
    return max(1, -(-size // GIB))


async def create(cloud: Cloud, fields: Mapping[str, Any]) -> str:
    """Ask for a volume; return its id. It is not ready yet.

    Raises:
        CloudError
    """
    body = {"volume": {name: value for name, value in fields.items() if value is not None}}
    answer = await cloud.call("block-storage", "POST", "/volumes", body=body)
    return str(answer["volume"]["id"])


async def status_of(cloud: Cloud, volume: str, *, is_given_up: bool = True) -> str | None:
    """Return a volume's status, None where there is no such volume."""
    try:
        answer = await cloud.call(
            "block-storage", "GET", f"/volumes/{volume}", is_given_up=is_given_up
        )
    except CloudError as error:
        if error.status == 404:
            return None
        raise
    return str(answer["volume"]["status"])


async def wait_for(cloud: Cloud, volume: str, wanted: str, passing: tuple[str, ...]) -> None:
    """Wait until a volume's status is ``wanted``; ``passing`` are those on the way.

    Raises:
        TargetError: another status came, or it took too long.
    """
    status: str | None = ""
    pause_s = _FIRST_POLL_S
    with anyio.move_on_after(TIMEOUT_S):
        while True:
            status = await status_of(cloud, volume)
            if status == wanted:
                return
            if status not in passing:
                break
            await anyio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LAST_POLL_S)
    how = "does not exist any more" if status is None else f"is ‘{status}’"
    raise TargetError(
        f"the volume {volume} {how} and should be ‘{wanted}’",
        hint=f"Cinder's log tells more, and: openstack volume message list --resource-id {volume}",
    )


async def attach(cloud: Cloud, server: Server, volume: str) -> None:
    """Ask for a volume to be attached, and wait until Cinder says that it is.

    Raises:
        TargetError
    """
    body = {"volumeAttachment": {"volumeId": volume}}
    await cloud.call("compute", "POST", f"/servers/{server.id}/os-volume_attachments", body=body)
    await wait_for(cloud, volume, "in-use", ("available", "reserved", "attaching"))


async def detach(cloud: Cloud, server: str, volume: str) -> None:
    """Ask for a volume to be detached, and wait until it is. It may be detached already.

    Raises:
        TargetError
    """
    path = f"/servers/{server}/os-volume_attachments/{volume}"
    try:
        await cloud.call("compute", "DELETE", path)
    except CloudError as error:
        if error.status != 404:
            raise
    await wait_for(cloud, volume, "available", ("in-use", "detaching"))


def device_of(volume: str, folder: Path) -> Path | None:
    """Return the device of a volume in ``folder``, None where it has not appeared (yet)."""
    try:
        found = sorted(entry for entry in folder.iterdir() if volume[:_SERIAL] in entry.name)
    except OSError:
        # udev makes the folder with its first entry.
        return None
    whole = [entry for entry in found if not _PARTITION.search(entry.name) and entry.exists()]
    return whole[0] if whole else None


async def wait_for_device(volume: str, folder: Path, server: Server) -> Path:
    """Wait until a volume that has been attached appears here.

    Raises:
        TargetError: it does not.
    """
    with anyio.move_on_after(TIMEOUT_S):
        while True:
            device = device_of(volume, folder)
            if device is not None:
                return device
            await anyio.sleep(_FIRST_POLL_S)
    raise TargetError(
        f"the volume {volume} was attached to the server ‘{server.name}’ and does not appear in "
        f"‘{folder}’ within {TIMEOUT_S:.0f} s",
        hint="-oo server-id must name the server that this runs in",
    )


async def find_marked(cloud: Cloud, mark: str) -> list[str]:
    """Return the ids of the volumes that carry a mark."""
    parameters = {"metadata": f"{{'{MARK}':'{mark}'}}"}
    return [
        str(each["id"])
        async for each in cloud.pages("block-storage", "/volumes/detail", "volumes", parameters)
        if each.get("metadata", {}).get(MARK) == mark
    ]


async def remove(cloud: Cloud, volume: str) -> None:
    """Detach a volume from wherever it is attached, delete it, and wait until it is gone.

    For ever where something is in its way: callers have a deadline.

    Raises:
        TargetError: it stays.
    """
    path = f"/volumes/{volume}"
    pause_s = _FIRST_POLL_S
    while True:
        try:
            answer = await cloud.call("block-storage", "GET", path)
        except CloudError as error:
            if error.status == 404:
                return
            raise
        found = answer["volume"]
        status = found["status"]
        if status == "in-use":
            for each in found.get("attachments", []):
                await _ask_to_detach(cloud, each["server_id"], volume)
        elif status in ("available", "error"):
            await _ask_to_delete(cloud, path)
        elif status == "error_deleting":
            raise TargetError("Cinder could not delete it: its log tells more")
        # All others (creating, reserved, attaching, detaching, deleting) pass.
        await anyio.sleep(pause_s)
        pause_s = min(pause_s * 2, _LAST_POLL_S)


async def _ask_to_detach(cloud: Cloud, server: str, volume: str) -> None:
    path = f"/servers/{server}/os-volume_attachments/{volume}"
    try:
        await cloud.call("compute", "DELETE", path, is_given_up=True)
    except CloudError as error:
        # 400 and 409: it is on its way already, or not quite there.
        if error.status not in (400, 404, 409):
            raise


async def _ask_to_delete(cloud: Cloud, path: str) -> None:
    try:
        await cloud.call("block-storage", "DELETE", path, is_given_up=True)
    except CloudError as error:
        if error.status not in (400, 404, 409):
            raise
