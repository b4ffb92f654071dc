"""What changed lands on the disks themselves, by servers that hold qemu's locks of them.

::

    begin:   servers for all disks ──> still as they were? ──> commit ──> write ──> forget
    finish:  servers for all disks ──────────────────────────────────────> write ──> forget
                                       (after a kill: what was committed, once more)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import anyio
import anyio.to_thread

from v2v_async import qemu_nbd
from v2v_async.errors import ServerStartError, SourceError, V2VError, most_telling
from v2v_async.events import Reporter
from v2v_async.in_place.journal import Journal, Landing, LandingDisk
from v2v_async.input import changes
from v2v_async.server import Servers, running_servers
from v2v_async.steps import step, stop_recorded
from v2v_async.units import format_size
from v2v_async.v2vdir import V2VDir, boot_id


async def serve_disks(
    v2vdir: V2VDir, disks: Sequence[LandingDisk], servers: Servers, *, as_source: bool = False
) -> list[int]:
    """Serve all disks, writable, as ``outN``, or ``inN``; nothing is written yet. Return the sizes.

    Raises:
        SourceError: one can't be opened, as when a guest that runs has it.
    """
    sizes = []
    for disk in disks:
        socket = (v2vdir.source_socket if as_source else v2vdir.target_socket)(disk.index)
        command = qemu_nbd.serve_image(Path(disk.path), disk.format, socket)
        log = v2vdir.log("land", disk.index)
        try:
            server = await servers.start(socket.name, command, log=log)
        except ServerStartError as error:
            raise SourceError(
                f"the disk ‘{disk.path}’ can't be opened for writing: {error.message}",
                hint="a guest that uses it must be shut down first",
                disk=disk.index,
                log=error.log,
            ) from error
        assert server.info is not None
        sizes.append(server.info.size)
    return sizes


async def commit_and_write(
    journal: Journal, landing: Landing, v2vdir: V2VDir, reporter: Reporter
) -> None:
    """Commit what has to land, whose disks are served, and write it: all or nothing from here on.

    Raises:
        V2VError: it can't be committed, and nothing was written; or as :func:`write`.
    """
    with anyio.CancelScope(shield=True):
        try:
            await anyio.to_thread.run_sync(journal.commit, landing)
        except OSError as error:
            raise not_kept(journal, error) from error
        await write(journal, landing, v2vdir, reporter)
    reporter.message(summary(landing))


def not_kept(journal: Journal, error: OSError) -> V2VError:
    """Return the error of a journal that can't be written."""
    return V2VError(
        f"what the conversion changed can't be kept in ‘{journal.path}’: {error.strerror}; the "
        "disks are as they were",
        hint="free space there, or set V2V_ASYNC_STATE to a directory that has more",
    )


async def write(journal: Journal, landing: Landing, v2vdir: V2VDir, reporter: Reporter) -> None:
    """Write to the disks, which are served, what was committed; then forget it.

    May be repeated. Not cancelled once it has begun: half of it is of use to nobody.

    Raises:
        V2VError: a disk can't be written; what has to land is kept.
    """

    async def one(disk: LandingDisk) -> None:
        endpoint = str(v2vdir.target_socket(disk.index))
        try:
            await changes.restore(endpoint, disk.data, disk.zero, journal.changes(disk.index))
        except OSError as error:
            raise V2VError(
                f"‘{journal.changes(disk.index)}’ can't be read: {error.strerror}", disk=disk.index
            ) from error
        except V2VError as error:
            error.locate(disk=disk.index)
            raise

    with anyio.CancelScope(shield=True):
        try:
            async with anyio.create_task_group() as group:
                for disk in landing.disks:
                    group.start_soon(one, disk)
        except BaseExceptionGroup as errors:
            error = most_telling(errors)
            if isinstance(error, V2VError):
                error.hint = (
                    "the disks have a part of the new content, and must not be used; what is "
                    f"missing is kept in ‘{journal.path}’: put right what is wrong, then run "
                    "‘v2v-async clean’, which completes it"
                )
            raise error from None
        if landing.report_path is not None:
            write_report(landing.report, Path(landing.report_path), reporter)
        journal.remove()


def write_report(text: str, path: Path, reporter: Reporter) -> None:
    """Write what ``-O FILE`` asked for; the disks are done, so that a failure is a warning."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.rename(path)
    except OSError as error:
        reporter.warning(f"-O: ‘{path}’ can't be written: {error.strerror}")


async def complete(journal: Journal, reporter: Reporter, *, tmpdir: Path | None = None) -> None:
    """Do with a dead run's journal what has to be done: land what was committed, or remove it.

    Raises:
        V2VError: it can't be completed; it is kept.
    """
    landing = journal.read()
    if landing is None:
        journal.remove()
        return
    mine = reporter.for_guest(landing.guest)
    names = ", ".join(f"‘{disk.path}’" for disk in landing.disks)
    mine.message(f"completing the in-place conversion of {names}, which was interrupted")
    before = V2VDir(Path(landing.v2vdir))
    if before.state_file.exists():
        if before.state.boot_id == boot_id():
            await stop_recorded(before)  # its servers would hold the images' locks
        before.remove()
    for disk in landing.disks:
        check_same(disk, journal)
    v2vdir = V2VDir.create(tmpdir)
    try:
        async with running_servers(v2vdir) as servers, step("land", v2vdir, mine):
            await serve_disks(v2vdir, landing.disks, servers)
            await write(journal, landing, v2vdir, mine)
    finally:
        v2vdir.remove()
    mine.message(f"{names}: {summary(landing)}")


def summary(landing: Landing) -> str:
    """Say how much landed."""
    many = len(landing.disks)
    total = format_size(sum(disk.length for disk in landing.disks))
    return f"{total} landed on {many} disk{'s' * (many != 1)}"


def check_same(disk: LandingDisk, journal: Journal) -> None:
    """See that a disk is still the file that it was.

    Raises:
        SourceError: it is not, or is gone.
    """
    try:
        status = os.stat(disk.path)
    except OSError as error:
        raise SourceError(
            f"the disk ‘{disk.path}’, whose in-place conversion was interrupted, can't be found: "
            f"{error.strerror}",
            hint=f"bring it back; or give it up: rm -r {journal.path}",
            disk=disk.index,
        ) from error
    if disk.inode is not None and disk.inode != status.st_ino:
        raise SourceError(
            f"‘{disk.path}’ is another file than the one whose in-place conversion was interrupted",
            hint=f"bring that one back; or give it up: rm -r {journal.path}",
            disk=disk.index,
        )
