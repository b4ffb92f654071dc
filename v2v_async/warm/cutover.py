"""``warm cutover``: the last delta, then the conversion on the target, then the target guest.

::

    guest off ──> last pass ──> convert on overlays over the targets ──> land ──> finalize
                  copied          fails: the plain copy stays             └ completed whatever
                                                                            happens, as in-place
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import anyio

from v2v_async import virt_v2v_in_place
from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import SourceError, TargetError, UsageError
from v2v_async.events import Reporter
from v2v_async.in_place import landing
from v2v_async.in_place.journal import Landing, LandingDisk
from v2v_async.input.image import DiskSource, FileImage
from v2v_async.input.kept import discard, save_changes
from v2v_async.input.overlay import serve_overlays
from v2v_async.model import TargetGuest
from v2v_async.options import ConvertOptions, CopyOptions
from v2v_async.preflight import check_scratch
from v2v_async.server import running_servers
from v2v_async.steps import run_convert, run_finalize, step, telling_guest
from v2v_async.warm.migration import Migration
from v2v_async.warm.start import remove
from v2v_async.warm.state import WarmFolder


@dataclass(frozen=True, slots=True)
class CutoverOptions:
    """``warm cutover``. ``shutdown_s``: ask the guest to shut down and wait so many seconds."""

    convert: ConvertOptions
    copy: CopyOptions
    shutdown_s: float | None = None


async def cutover(options: CutoverOptions, path: Path, reporter: Reporter) -> TargetGuest:
    """Make the target guest of a source guest that is off; remove what the migration made else.

    What was done is not done again by the next cutover. Until the conversion has ended well the
    targets are a plain copy of the source, which later passes can go on from.

    Raises:
        V2VError: with step, disk and log, as far as they apply.
    """
    NetworkMap(options.convert.network)  # raises where two mappings contradict each other
    folder = WarmFolder(path)
    with folder.held():
        migration = Migration(folder, folder.read(), reporter)
        await migration.adopt()
        async with telling_guest(reporter, migration.state.guest):
            await _land_left(migration)
            if migration.state.phase != "converted":
                await _copy_the_last(migration, options)
                await _convert(migration, options.convert)
            target = await _finalize(migration)
            await migration.changed.forget(None, migration.reporter)
        remove(folder)
    return target


async def _copy_the_last(migration: Migration, options: CutoverOptions) -> None:
    # Before the guest is shut down: what can be known to go wrong.
    check_scratch(migration.folder.path)
    await virt_v2v_in_place.probe()
    if options.shutdown_s is not None:
        if migration.watched is None:
            raise UsageError(
                f"--shutdown: ‘-i {migration.state.input.mode}’ can't shut a guest down",
                hint="shut it down where it runs, and leave the option out",
            )
        async with step("shutdown", migration.v2vdir, migration.reporter):
            await migration.watched.shut_down(options.shutdown_s)
    await migration.refuse_running()
    await migration.run_pass(options.copy)
    if migration.watched is not None and not migration.state.passes[-1].is_off:
        raise SourceError(
            f"the guest ‘{migration.state.guest}’ was started while it was copied",
            hint="shut it down, then cutover again",
        )
    migration.update(phase="copied")


async def _convert(migration: Migration, options: ConvertOptions) -> None:
    """Convert on overlays over the targets, and have what changed land on them, or nothing."""
    v2vdir, journal, reporter = migration.v2vdir, migration.journal, migration.reporter
    paths = await migration.target_files()
    source = v2vdir.read_source()
    format_ = migration.output.disks.format
    discard(v2vdir)
    shutil.rmtree(journal.path, ignore_errors=True)  # of one that was not committed
    journal.path.mkdir(mode=0o700)
    try:
        async with running_servers(v2vdir) as servers:
            async with step("input", v2vdir, reporter):
                overlaid = [
                    DiskSource(FileImage(path), format_, disk.size)
                    for path, disk in zip(paths, source.disks, strict=True)
                ]
                await serve_overlays(overlaid, "kept", v2vdir, servers)
            name = migration.state.output.name
            await run_convert(v2vdir, source, options, name, reporter)
            async with step("land", v2vdir, reporter) as mine:
                disks = []
                try:
                    for disk, path in zip(source.disks, paths, strict=True):
                        changes = journal.changes(disk.index)
                        data, zero = await save_changes(v2vdir, disk.index, changes)
                        disks.append(
                            LandingDisk(
                                index=disk.index,
                                path=str(path),
                                format=format_,
                                inode=path.stat().st_ino,
                                data=data,
                                zero=zero,
                            )
                        )
                except OSError as error:
                    raise TargetError(
                        f"what the conversion changed can't be kept in ‘{journal.path}’: "
                        f"{error.strerror}; the targets are the plain copy",
                        hint="free space there, then cutover again",
                    ) from error
                await servers.stop_all()
                what = Landing(guest=source.name, v2vdir=str(v2vdir.path), disks=disks)
                await landing.serve_disks(v2vdir, disks, servers)
                await landing.commit_and_write(journal, what, v2vdir, mine)
    finally:
        discard(v2vdir)


async def _land_left(migration: Migration) -> None:
    """Complete what a process that was killed had begun to write to the targets."""
    journal, v2vdir = migration.journal, migration.v2vdir
    what = journal.read()
    if what is None:
        return
    for disk in what.disks:
        landing.check_same(disk, journal)
    async with (
        running_servers(v2vdir) as servers,
        step("land", v2vdir, migration.reporter) as mine,
    ):
        await landing.serve_disks(v2vdir, what.disks, servers)
        await landing.write(journal, what, v2vdir, mine)


async def _finalize(migration: Migration) -> TargetGuest:
    v2vdir = migration.v2vdir
    target = v2vdir.read_target()
    if v2vdir.state.is_finalized:
        return target
    if v2vdir.state.is_publishing:
        # Names that were given too early are taken back.
        async with running_servers(v2vdir) as servers:
            is_held = await migration.output.reopen(
                v2vdir, target.source, target.name, servers, migration.reporter
            )
        if not is_held:
            migration.update(phase="syncing", is_whole=False, base=None, stamps=None)
            raise TargetError(
                "the converted disks are gone", hint="cutover again: everything is copied anew"
            )
    with anyio.CancelScope(shield=True):
        await run_finalize(v2vdir, migration.output, target, migration.reporter)
    return target
