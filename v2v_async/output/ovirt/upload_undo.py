"""What ``-o rhv-upload`` has made, taken back: the guest, then the transfers, then the disks."""

from __future__ import annotations

import anyio

from v2v_async.errors import V2VError
from v2v_async.events import Reporter
from v2v_async.output.ovirt.engine_guest import remove_guest
from v2v_async.output.ovirt.session import Session, connected
from v2v_async.output.ovirt.transfers import cancel_transfer, cancel_transfers_of, remove_disk
from v2v_async.ovirt_engine import EngineLogin
from v2v_async.redact import redact
from v2v_async.v2vdir import MadeObject, V2VDir

DISK, TRANSFER, GUEST = "oVirt disk", "oVirt image transfer", "oVirt guest"
"""``MadeObject.kind``. A disk's name is its id and, behind a space, its description."""

TIMEOUT_S = 45.0
"""Less than what guest.py gives to abandon: there must be time to tell what is left."""

_MARK = "v2v-imageio: "  # imageio_plugin.py writes it before the reason of a failure


async def take_back(login: EngineLogin, v2vdir: V2VDir, reporter: Reporter) -> None:
    """Remove what ``state.json`` has of this run, and tell what could not be removed."""
    ours = [made for made in v2vdir.state.objects if made.kind in (DISK, TRANSFER, GUEST)]
    if not ours:
        return
    problems = dict.fromkeys((made.name for made in ours), f"no answer within {TIMEOUT_S:.0f} s")
    with anyio.move_on_after(TIMEOUT_S, shield=True):
        try:
            async with connected(login, gives_up=True) as session:
                await _take_back(session, v2vdir, ours, problems)
        except V2VError as error:
            problems = dict.fromkeys(problems, error.message)
    left = [made for made in v2vdir.state.objects if made in ours]
    for made in left:
        # The disk goes with its transfer.
        reporter.warning(
            f"the {made.kind} {_id(made)} may be left: {problems[made.name]}; "
            f"remove it with: {made.undo}"
        )


async def _take_back(
    session: Session, v2vdir: V2VDir, ours: list[MadeObject], problems: dict[str, str]
) -> None:
    async def remove(made: MadeObject) -> None:
        try:
            match made.kind:
                case "oVirt guest":
                    await remove_guest(session, _id(made), TIMEOUT_S)
                case "oVirt image transfer":
                    await cancel_transfer(session, _id(made))
                case _:
                    description = made.name.partition(" ")[2]
                    await remove_disk(session, _id(made), description, TIMEOUT_S)
        except V2VError as error:
            problems[made.name] = error.message
        else:
            v2vdir.forget_object(made)

    async def all_of(kind: str) -> None:
        async with anyio.create_task_group() as group:
            for made in ours:
                if made.kind == kind:
                    group.start_soon(remove, made)

    await all_of(GUEST)
    await all_of(TRANSFER)
    disks = {_id(made) for made in ours if made.kind == DISK}
    if len(disks) > sum(made.kind == TRANSFER for made in ours):
        # The answer to one that was begun may have been lost.
        try:
            await cancel_transfers_of(session, disks)
        except V2VError as error:
            problems.update({made.name: error.message for made in ours if made.kind == DISK})
    await all_of(DISK)


def _id(made: MadeObject) -> str:
    return made.name.partition(" ")[0]


def tell_imageio(v2vdir: V2VDir, reporter: Reporter) -> None:
    """Say why imageio refused what it did: NBD has room for a number only."""
    for path in sorted(v2vdir.log_directory.glob("output-*.log")):
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 64 * 1024))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            continue
        said = [line.rpartition(_MARK)[2] for line in lines if _MARK in line]
        if said:
            disk = path.stem.rpartition("-")[2]
            # The first: what came after it may be of its making.
            reporter.warning(f"disk {disk}: {redact(said[0])}")
