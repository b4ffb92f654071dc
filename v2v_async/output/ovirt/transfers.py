"""Disks of an engine, and the image transfers that fill them.

::

    POST disks ──> locked ──> ok ──> POST imagetransfers ──> initializing ──> transferring
                                                                                   │ data
        ok <── finished_success <── finalizing_success <── POST …/finalize ────────┤
        removed <── finished_cleanup <── POST …/cancel ────────────────────────────┘

The engine makes and ends all of them in the background; what it says of them is polled.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from lxml import etree

from v2v_async.errors import TargetError
from v2v_async.output.ovirt.session import Session, Site, waiting
from v2v_async.ovirt_engine import EngineError, UncertainError, text

READY_TIMEOUT_S = 300.0
"""For a disk or a transfer to change its state: a host may have to be asked over a slow network."""

PREALLOCATION_TIMEOUT_S = 3600.0
"""Storage without fallocate (NFS before 4.2) writes every byte: a TiB at 300 MiB/s."""

INACTIVITY_S = 600
"""After this long without a word of us the engine ends a transfer. We speak every 20 s: a network
may be away for minutes; and when we were killed, the disk is gone soon."""

_FORMATS = {"raw": "raw", "qcow2": "cow"}
# From when on an engine knows these elements of a transfer.
_HAS_FORMAT, _HAS_POLICY = (4, 3), (4, 5)
_RUNNING = ("initializing", "transferring", "resuming", "paused_user", "paused_system")


@dataclass(frozen=True, slots=True)
class NewDisk:
    """A disk to be made. ``size`` is bytes; ``description`` tells ours from somebody else's."""

    index: int
    id: str
    name: str
    size: int
    format: Literal["raw", "qcow2"]
    is_preallocated: bool
    description: str


async def make_disk(session: Session, site: Site, disk: NewDisk) -> None:
    """Make a disk, and wait until it can be used.

    Raises:
        EngineError: the engine refuses; it was not made.
        TargetError: it may have been made, but is of no use.
    """
    root = etree.Element("disk", id=disk.id)
    _add(root, "name", disk.name)
    _add(root, "description", disk.description)
    _add(root, "format", _FORMATS[disk.format])
    _add(root, "provisioned_size", str(disk.size))
    if not disk.is_preallocated:
        # On block storage a qcow2 disk can't grow while it is uploaded.
        _add(root, "initial_size", str(disk.size))
    _add(root, "sparse", "false" if disk.is_preallocated else "true")
    etree.SubElement(_add(root, "storage_domains"), "storage_domain", id=site.domain)
    await session.post("disks", root)
    timeout_s = PREALLOCATION_TIMEOUT_S if disk.is_preallocated else READY_TIMEOUT_S
    status = "locked"
    async for _ in waiting(timeout_s):
        try:
            found = await session.find(f"disks/{disk.id}")
        except EngineError as error:
            raise TargetError(error.message, hint=error.hint) from error
        if found is None:
            raise TargetError(
                f"the engine could not make the disk ‘{disk.name}’ and removed it again",
                hint="Events in the engine's Administration Portal tell why",
            )
        status = text(found, "status", "ok")
        if status == "ok":
            return
        if status == "illegal":
            break
    raise TargetError(
        f"the new disk ‘{disk.name}’ is ‘{status}’, and does not become usable",
        hint="Events in the engine's Administration Portal tell why",
    )


async def has_disk(session: Session, disk: str) -> bool:
    """Return whether there is a disk of this UUID."""
    return await session.find(f"disks/{disk}") is not None


async def start_transfer(session: Session, site: Site, disk: str) -> str:
    """Ask for an upload to a disk; return its id.

    Raises:
        EngineError: the engine refuses.
        UncertainError: it may have been started.
    """
    root = etree.Element("image_transfer")
    etree.SubElement(root, "disk", id=disk)
    _add(root, "direction", "upload")
    if site.version >= _HAS_FORMAT:
        # Whatever the disk is: a host's qemu makes qcow2 of it.
        _add(root, "format", "raw")
    if site.host is not None:
        etree.SubElement(root, "host", id=site.host)
    _add(root, "inactivity_timeout", str(INACTIVITY_S))
    if site.version >= _HAS_POLICY:
        # A paused transfer keeps its disk locked until somebody comes.
        _add(root, "timeout_policy", "cancel")
    return (await session.post("imagetransfers", root)).get("id", "")


async def transfer_url(session: Session, transfer: str, *, use_proxy: bool) -> str:
    """Wait until data can be sent; return where to. Who knows the URL may write to the disk.

    Raises:
        TargetError: it does not come to that.
    """
    path = f"imagetransfers/{transfer}"
    phase = "initializing"
    async for _ in waiting(READY_TIMEOUT_S):
        found = await session.find(path)
        if found is None:
            raise TargetError(
                f"the engine ended the image transfer {transfer} before it began",
                hint="Events in the engine's Administration Portal tell why",
            )
        phase = text(found, "phase")
        if phase == "transferring":
            url = text(found, "proxy_url" if use_proxy else "transfer_url")
            if not url.startswith("https://"):
                raise TargetError(
                    f"the engine gives no {'proxy' if use_proxy else 'direct'} address for the "
                    f"image transfer {transfer}",
                    hint="leave out -oo rhv-proxy" if use_proxy else "add -oo rhv-proxy",
                )
            return url
        if phase != "initializing":
            break
    hint = (
        "is ovirt-imageio running on the hosts? Events in the engine's Administration Portal tell "
        "more"
    )
    raise TargetError(
        f"the image transfer {transfer} does not begin: its phase is ‘{phase}’", hint=hint
    )


async def finalize_transfer(session: Session, transfer: str, disk: str) -> None:
    """End an upload, and wait until the disk can be used.

    Raises:
        TargetError: the engine does not take the disk for good.
    """
    path = f"imagetransfers/{transfer}"
    await session.post(f"{path}/finalize", etree.Element("action"))
    phase = "finalizing_success"
    async for _ in waiting(READY_TIMEOUT_S):
        found = await session.find(path)
        # Engines before 4.4.7 forget a transfer as soon as it has ended; the disk is unlocked then.
        phase = "forgotten" if found is None else text(found, "phase")
        if phase in ("finished_success", "forgotten"):
            break
        if phase not in ("finalizing_success", "transferring"):
            raise _not_finalized(disk, f"the phase of its transfer is ‘{phase}’")
    else:
        raise _not_finalized(disk, f"its transfer stays in the phase ‘{phase}’")
    status = "gone"
    async for _ in waiting(READY_TIMEOUT_S):
        made = await session.find(f"disks/{disk}")
        status = "gone" if made is None else text(made, "status", "ok")
        if status == "ok":
            return
        if status != "locked":
            break
    raise _not_finalized(disk, f"it is {status}")


def _not_finalized(disk: str, why: str) -> TargetError:
    return TargetError(
        f"the engine does not take the uploaded disk {disk}: {why}",
        hint="Events in the engine's Administration Portal tell why",
    )


# Taking back.


async def cancel_transfer(session: Session, transfer: str) -> None:
    """Cancel a transfer, if it is still running; the engine then removes the disk.

    Raises:
        TargetError: the engine can't be reached.
    """
    found = await session.find(f"imagetransfers/{transfer}")
    if found is None or text(found, "phase") not in _RUNNING:
        return
    try:
        await session.post(f"imagetransfers/{transfer}/cancel", etree.Element("action"))
    except (EngineError, UncertainError):
        # It has just ended, or will: the disk shows.
        return


async def cancel_transfers_of(session: Session, disks: Collection[str]) -> None:
    """Cancel the transfers to these disks whose id we never got to know."""
    listed = await session.get("imagetransfers")
    for found in listed.iterfind("image_transfer"):
        target = found.find("disk")
        if target is not None and target.get("id") in disks:
            await cancel_transfer(session, found.get("id", ""))


async def remove_disk(session: Session, disk: str, description: str, timeout_s: float) -> None:
    """Remove a disk, where it is ours; return when it is gone.

    Raises:
        TargetError: it can't be removed.
    """
    problem = "the engine has not removed it in time"
    async for _ in waiting(timeout_s):
        found = await session.find(f"disks/{disk}")
        if found is None or text(found, "description") != description:
            return
        if text(found, "status") == "locked":
            problem = "it is locked"
            continue
        try:
            await session.delete(f"disks/{disk}")
        except EngineError as error:
            problem = error.message
    raise TargetError(f"the disk {disk} can't be removed: {problem}")


def _add(parent: etree._Element, tag: str, value: str | None = None) -> etree._Element:
    element = etree.SubElement(parent, tag)
    element.text = value
    return element
