"""Convert a guest on its own disks.

::

    check ──> input ──> convert ──> land ──> clean up
              overlays              what changed: saved, the disks locked, committed, written
              └──── the disks are only read ────┘         └─ completed, whatever happens ─┘

``--direct`` is virt-v2v-in-place's own way: it writes to the disks themselves.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread

from v2v_async import virt_v2v_in_place
from v2v_async.connection import connected, count_data
from v2v_async.convert.inspector_xml import inspector_xml
from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import SourceError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.in_place import landing
from v2v_async.in_place.journal import Journal, Landing, LandingDisk, left_journals, new_journal
from v2v_async.input.checking import raise_problems, with_sizes
from v2v_async.input.kept import save_changes
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceDisk, SourceGuest, TargetGuest
from v2v_async.options import ConvertOptions, InPlaceOptions, InputOptions
from v2v_async.preflight import check_scratch
from v2v_async.qemu_img import SECTOR
from v2v_async.server import Servers, running_servers
from v2v_async.steps import (
    look_at_source,
    run_convert,
    run_input,
    step,
    telling_guest,
    v2v_directory,
)
from v2v_async.v2vdir import V2VDir, default_parent

KINDS = ("disk", "libvirt", "libvirtxml")
"""The inputs whose disks may be local files."""


async def convert_in_place(
    options: InPlaceOptions, reporter: Reporter, *, tmpdir: Path | None = None
) -> str:
    """Convert one guest where it is; return virt-v2v-inspector's document about it.

    Until all that changed is on stable storage (in the state folder) and the disks are locked,
    they are only read: when this raises or is cancelled before, they are byte for byte as they
    were. From then on it is completed: by this process, or after a kill by :func:`complete_all`.
    What earlier runs left is completed first.

    Raises:
        V2VError: with step, disk and log, as far as they apply.
    """
    NetworkMap(options.convert.network)  # raises where two mappings contradict each other
    source_input = parse_input(_kept(options.input))
    await complete_all(reporter, tmpdir=tmpdir)
    source = await look_at_source(source_input, reporter)
    disks = _disks(source)
    stamps = _stamps(disks)
    check_scratch(tmpdir or default_parent())
    await virt_v2v_in_place.probe()
    path = None if options.report in (None, "-") else Path(options.report or "").absolute()
    async with telling_guest(reporter, source.name) as mine:
        with new_journal() as journal:
            async with v2v_directory(tmpdir, mine) as v2vdir, running_servers(v2vdir) as servers:
                if options.direct:
                    target, report = await _direct(
                        source, disks, options.convert, path, v2vdir, servers, mine
                    )
                else:
                    source = await run_input(v2vdir, source_input, servers, mine)
                    target = await run_convert(v2vdir, source, options.convert, None, mine)
                    async with step("land", v2vdir, mine) as land:
                        report = await report_of(target, v2vdir)
                        what = await _save(journal, disks, target, report, path, v2vdir)
                        await servers.stop_all()
                        _check_unwritten(disks, stamps)
                        await landing.serve_disks(v2vdir, disks, servers)
                        await landing.commit_and_write(journal, what, v2vdir, land)
    return report


async def complete_all(reporter: Reporter, *, tmpdir: Path | None = None) -> int:
    """Complete what dead runs committed, remove what they did not; return how many there were.

    One that can't be completed is told of, and kept.

    Raises:
        V2VError: the folder of journals can't be read.
    """
    count = 0
    for journal in left_journals():
        try:
            await landing.complete(journal, reporter, tmpdir=tmpdir)
            count += 1
        except V2VError as error:
            reporter.warning(f"{error.message}; {error.hint}" if error.hint else error.message)
    return count


def _kept(options: InputOptions) -> InputOptions:
    """Return the options of an input whose overlays tell what was changed in them.

    Raises:
        UsageError: its disks are no local files, or the options ask for another overlay.
    """
    if options.kind not in KINDS:
        raise UsageError(
            f"in-place conversion needs disks that are local files: ‘-i {options.mode}’ has none",
            hint=f"it takes -i {', '.join(KINDS[:-1])} and {KINDS[-1]}; v2v-async convert makes "
            "new disks",
        )
    given = dict(options.options).get("overlay")
    if given == "cow":
        raise UsageError(
            "-io overlay=cow does not tell what was changed in it", hint="leave the option out"
        )
    if given is not None:
        return options
    return replace(options, options=(*options.options, ("overlay", "kept")))


def _disks(source: SourceGuest) -> list[LandingDisk]:
    """Return the disks as what will be landed on.

    Raises:
        SourceError: all that is wrong with any of them.
    """
    found: list[LandingDisk] = []
    problems: list[tuple[int, V2VError]] = []
    for disk in source.disks:
        try:
            found.append(_disk(disk))
        except SourceError as error:
            problems.append((disk.index, error))
    raise_problems(problems)
    return found


def _disk(disk: SourceDisk) -> LandingDisk:
    """Return a disk as what will be landed on.

    Raises:
        SourceError: it is not a local file that can be written.
    """
    if not disk.files:
        raise SourceError(
            f"the disk ‘{disk.source}’ is not a local file",
            hint="in-place conversion writes to local files and block devices only",
            disk=disk.index,
        )
    path = Path(disk.files[0])
    if not os.access(path, os.W_OK):
        raise SourceError(
            f"the disk ‘{path}’ can't be written",
            hint="check its mode, and who you are",
            disk=disk.index,
        )
    status = path.stat()
    is_file = stat.S_ISREG(status.st_mode)
    if disk.format == "raw" and is_file and status.st_size % SECTOR:
        raise SourceError(
            f"the disk ‘{path}’ ends in the middle of a sector ({status.st_size} bytes)",
            hint=f"lengthen it: truncate --size=%{SECTOR} {path}",
            disk=disk.index,
        )
    return LandingDisk(
        index=disk.index,
        path=str(path),
        format=disk.format,
        inode=status.st_ino if is_file else None,
    )


async def report_of(target: TargetGuest, v2vdir: V2VDir) -> str:
    """Return the document that ``-O`` asks for; the source's disks are still served."""
    allocated = {}
    for disk in target.source.disks:
        async with connected(str(v2vdir.source_socket(disk.index))) as connection:
            allocated[disk.index] = await count_data(connection)
    return inspector_xml(
        target.source,
        target.inspection,
        target.firmware,
        allocated=allocated,
        program="v2v-async in-place",
    )


def _check_unwritten(disks: Sequence[LandingDisk], stamps: Sequence[tuple[int, ...]]) -> None:
    """See that nobody has written to the disks since ``stamps`` were taken.

    Raises:
        SourceError
    """
    for disk, before, now in zip(disks, stamps, _stamps(disks), strict=True):
        if before != now:
            raise SourceError(
                f"‘{disk.path}’ was written or replaced during the conversion, by something else",
                hint="shut down the guest, and convert it again",
                disk=disk.index,
            )


def _stamps(disks: Sequence[LandingDisk]) -> list[tuple[int, ...]]:
    """Return what changes when somebody writes to the disks, as far as it can be seen."""
    found: list[tuple[int, ...]] = []
    for disk in disks:
        status = os.stat(disk.path)
        is_file = stat.S_ISREG(status.st_mode)
        found.append((status.st_ino, status.st_size, status.st_mtime_ns) if is_file else ())
    return found


async def _save(
    journal: Journal,
    disks: Sequence[LandingDisk],
    target: TargetGuest,
    report: str,
    path: Path | None,
    v2vdir: V2VDir,
) -> Landing:
    """Save what the conversion changed; return what has to land.

    Raises:
        V2VError: it can't be read, or there is no room for it.
    """
    found = []
    try:
        for disk in disks:
            data, zero = await save_changes(v2vdir, disk.index, journal.changes(disk.index))
            found.append(disk.model_copy(update={"data": data, "zero": zero}))
    except OSError as error:
        raise landing.not_kept(journal, error) from error
    return Landing(
        guest=target.source.name,
        v2vdir=str(v2vdir.path),
        disks=found,
        report=report,
        report_path=None if path is None else str(path),
    )


async def _direct(
    source: SourceGuest,
    disks: Sequence[LandingDisk],
    options: ConvertOptions,
    path: Path | None,
    v2vdir: V2VDir,
    servers: Servers,
    reporter: Reporter,
) -> tuple[TargetGuest, str]:
    """Convert on the disks themselves: what fails leaves them in an unknown state."""
    reporter.warning("--direct: a conversion that fails leaves the disks in an unknown state")
    async with step("input", v2vdir, reporter):
        sizes = await landing.serve_disks(v2vdir, disks, servers, as_source=True)
        source = with_sizes(source, sizes)
        v2vdir.write_source(source)
    target = await run_convert(v2vdir, source, options, None, reporter)
    async with step("land", v2vdir, reporter):
        for disk in disks:
            async with connected(str(v2vdir.source_socket(disk.index))) as connection:
                await anyio.to_thread.run_sync(connection.handle.flush_now)
        report = await report_of(target, v2vdir)
        await servers.stop_all()
        if path is not None:
            landing.write_report(report, path, reporter)
    return target, report
