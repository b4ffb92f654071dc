"""What ``-o rhv-upload``'s setup made, for finalize in another process; and all disks at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import anyio
from pydantic import ValidationError

from v2v_async.errors import TargetError, V2VError, most_telling
from v2v_async.model import Model
from v2v_async.output.ovirt.transfers import NewDisk
from v2v_async.v2vdir import V2VDir


class UploadedDisk(Model):
    """A disk, and the transfer that fills it. ``size`` is bytes."""

    index: int
    id: str
    size: int
    transfer: str


class _Record(Model):
    disks: list[UploadedDisk]


_D = TypeVar("_D", NewDisk, UploadedDisk)


def write_record(v2vdir: V2VDir, disks: Sequence[UploadedDisk]) -> None:
    """Write ``out.ovirt.json``."""
    _path(v2vdir).write_text(_Record(disks=list(disks)).model_dump_json(indent=2) + "\n")


def read_record(v2vdir: V2VDir, count: int) -> list[UploadedDisk]:
    """Return the disks of ``out.ovirt.json``; ``count`` is how many the guest has.

    Raises:
        TargetError: it is not there, or of another guest.
    """
    path = _path(v2vdir)
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise TargetError(
            f"‘{path}’ can't be read: {error}",
            hint="the output must be set up first, with the same options",
        ) from error
    if len(record.disks) != count:
        raise TargetError(
            f"setup made {len(record.disks)} disks, and the guest has {count}",
            hint="the output must be set up for this guest",
        )
    return record.disks


async def for_each(work: Callable[[_D], Awaitable[None]], disks: Sequence[_D]) -> None:
    """Do ``work`` for all disks at once; the first that fails ends the others.

    Raises:
        V2VError: its ``disk`` says which.
    """

    async def run(disk: _D) -> None:
        try:
            await work(disk)
        except V2VError as error:
            error.locate(disk=disk.index)
            raise

    try:
        async with anyio.create_task_group() as group:
            for disk in disks:
                group.start_soon(run, disk)
    except BaseExceptionGroup as group_error:
        raise most_telling(group_error) from None


def _path(v2vdir: V2VDir) -> Path:
    return v2vdir.path / "out.ovirt.json"
