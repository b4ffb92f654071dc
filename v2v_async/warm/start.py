"""``warm start``, ``sync``, ``status`` and ``abort``."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio

from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.input.contract import Input
from v2v_async.input.libvirt.domain_xml import parse_domain
from v2v_async.input.libvirt.guest import LibvirtInput
from v2v_async.input.registry import parse_input
from v2v_async.libvirt_connection import connected
from v2v_async.model import SourceGuest
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.preflight import preflight
from v2v_async.steps import telling_guest
from v2v_async.units import format_lapse, format_size
from v2v_async.v2vdir import boot_id
from v2v_async.warm.changed import dirty_ranges
from v2v_async.warm.forecast import Forecast, forecast
from v2v_async.warm.from_libvirt import refuse_remote
from v2v_async.warm.from_vmware import FoundMachine, look, unopened
from v2v_async.warm.migration import Migration, parse_target
from v2v_async.warm.state import (
    KeptInput,
    KeptMachine,
    KeptOutput,
    Method,
    Pass,
    WarmDisk,
    WarmFolder,
    WarmState,
)

# Passes that do not get smaller, one after the other, before it is said that they will not.
_PATIENCE = 3
# Options whose values are files: the next command may run elsewhere.
_FILES = ("vddk-config", "vddk-libdir")


@dataclass(frozen=True, slots=True)
class StartOptions:
    """``warm start``. ``socket_dir``: where qemu may make a socket; ``bitmap``: of the exports.

    ``password_file``: of ``-ip``, for the passes to come.
    """

    input: InputOptions
    output: OutputOptions
    copy: CopyOptions
    socket_dir: Path | None = None
    bitmap: str | None = None
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """``warm sync``. ``every_s``: seconds between two passes' beginnings.

    ``below``: bytes that a pass copies, and ``below_s``: seconds of downtime that are forecast,
    under which it ends. With none of the three there is one pass.
    """

    copy: CopyOptions
    every_s: float | None = None
    below: int | None = None
    below_s: float | None = None

    @property
    def is_one(self) -> bool:
        """Whether one pass is all."""
        return self.every_s is None and self.below is None and self.below_s is None


async def start(options: StartOptions, path: Path, reporter: Reporter) -> WarmState:
    """Look at everything, make the folder and the targets, and copy everything once.

    When this fails or is cancelled after the folder was made, ``sync`` goes on and ``abort``
    removes it.

    Raises:
        V2VError: with step, disk and log, as far as they apply.
    """
    folder = WarmFolder(path)
    output = parse_target(options.output)
    if options.input.kind == "libvirt":
        refuse_remote(options.input.connection)
    machine = await look(options.input) if options.input.kind == "vddk" else None
    source_input = _input(options.input, machine)
    source = await preflight(source_input, output, options.output.name, path.parent, reporter)
    disks = await _disks(options.input, source, machine)
    method = await _method(options, disks, machine)
    name = options.output.name or source.name
    for final in output.disk_paths(len(source.disks), name):
        if output.existing(final) is not None:
            raise UsageError(
                f"‘{final}’ is a block device; a warm migration makes files",
                hint="move the link away, or give another -os DIR",
            )
    folder.make()
    with folder.held():
        folder.v2vdir.adopt()
        folder.v2vdir.update(boot_id=boot_id())
        folder.v2vdir.write_source(source)
        state = WarmState(
            run=reporter.run,
            guest=source.name,
            method=method,
            input=_kept_input(options.input, options.password_file),
            output=_kept_output(options.output),
            socket_dir=None if options.socket_dir is None else str(options.socket_dir.absolute()),
            bitmap=options.bitmap,
            disks=disks,
            machine=None
            if machine is None
            else KeptMachine(moref=machine.moref, was_tracked=machine.is_tracked),
        )
        folder.save(state)
        migration = Migration(folder, state, reporter)
        if method == "digests":
            migration.reporter.warning(_cost(source, has_bitmap=options.bitmap is not None))
        async with telling_guest(reporter, source.name):
            try:
                await migration.run_pass(options.copy)
            except V2VError as error:
                error.hint = error.hint or (
                    f"put it right, then go on: v2v-async warm sync --state {path}; or give it up: "
                    f"v2v-async warm abort --state {path}"
                )
                raise
        return migration.state


async def sync(options: SyncOptions, path: Path, reporter: Reporter) -> WarmState:
    """Copy what has changed: once, or until little enough changes between two passes.

    Raises:
        UsageError: the guest is converted already.
        V2VError: a pass failed; the next one repeats it.
    """
    folder = WarmFolder(path)
    with folder.held():
        migration = Migration(folder, folder.read(), reporter)
        if migration.state.phase == "converted" or migration.journal.read() is not None:
            raise UsageError(
                f"the copy of ‘{migration.state.guest}’ has been converted already",
                hint=f"complete it: v2v-async warm cutover --state {path}",
            )
        await migration.adopt()
        async with telling_guest(reporter, migration.state.guest):
            await _passes(options, migration)
        return migration.state


async def _passes(options: SyncOptions, migration: Migration) -> None:
    smallest, patience = None, _PATIENCE
    while True:
        began = time.monotonic()
        done = await migration.run_pass(options.copy)
        if done is None:
            migration.reporter.message("the guest is off, and nothing has changed since")
            return
        found = forecast(migration.state.passes, time.time())
        if found is not None:
            migration.reporter.emit("message", told(found), details=asdict(found))
        if options.is_one or _is_below(options, done, found):
            return
        if options.every_s is None:
            # Back to back: is that getting anywhere?
            patience = _PATIENCE if smallest is None or done.changed < smallest else patience - 1
            smallest = done.changed if smallest is None else min(smallest, done.changed)
            if patience == 0:
                migration.reporter.warning(
                    f"{_PATIENCE} passes did not get smaller than {format_size(smallest)}: the "
                    "guest writes as fast as it is copied; --until-below is not reached"
                )
                return
        else:
            await anyio.sleep(max(0.0, options.every_s - (time.monotonic() - began)))


def _is_below(options: SyncOptions, done: Pass, found: Forecast | None) -> bool:
    if options.below is not None and not done.is_all and done.changed < options.below:
        return True
    return options.below_s is not None and found is not None and found.downtime_s < options.below_s


def told(found: Forecast) -> str:
    """Return the forecast in words."""
    text = (
        f"{format_size(found.dirty_rate)}/s change, {format_size(found.throughput)}/s are copied: "
        f"a cutover now would copy about {format_size(found.left)} and take "
        f"{format_lapse(found.downtime_s)}, before the conversion"
    )
    if found.is_worth_a_pass:
        text += f"; after another sync {format_lapse(found.next_downtime_s)}"
    return text


async def abort(path: Path, reporter: Reporter) -> None:
    """Remove all that a migration made, on the source, of the target, and its folder.

    May be repeated. The guest is not touched.

    Raises:
        V2VError: the source can't be asked; the folder stays, so that this can be repeated.
    """
    folder = WarmFolder(path)
    with folder.held():
        migration = Migration(folder, folder.read(), reporter)
        await migration.adopt()
        await migration.changed.forget(None, migration.reporter)
        await migration.output.abandon(folder.v2vdir, migration.reporter)
        remove(folder)


def remove(folder: WarmFolder) -> None:
    """Remove the folder; what says that it is one goes last but for the folder."""
    for entry in folder.path.iterdir():
        if entry.name in ("warm.json", "lock"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder.path, ignore_errors=True)


def _input(options: InputOptions, machine: FoundMachine | None) -> Input:
    if machine is not None:
        return unopened(options, machine)
    source = parse_input(options)
    if isinstance(source, LibvirtInput):
        source.accepts_running = True
    return source


async def _disks(
    options: InputOptions, source: SourceGuest, machine: FoundMachine | None
) -> list[WarmDisk]:
    """Return the disks as the passes need to know them."""
    places: list[tuple[str | None, str]] = [(None, "")] * len(source.disks)
    if options.kind == "libvirt":
        async with connected(options.connection, None) as connection:
            found = await connection.domain(options.arguments[0])
        places = [
            (disk.device, disk.location) for disk in parse_domain(found.xml, "the guest").disks
        ]
    elif machine is not None:
        places = [(str(disk.key), disk.file) for disk in machine.disks]
    return [
        WarmDisk(
            index=disk.index,
            format=disk.format,
            size=disk.size,
            device=device,
            location=location,
            path=disk.files[0] if disk.files else None,
        )
        for disk, (device, location) in zip(source.disks, places, strict=True)
    ]


async def _method(
    options: StartOptions, disks: list[WarmDisk], machine: FoundMachine | None
) -> Method:
    """Return how it is found out what has changed.

    Raises:
        UsageError: a bitmap was named that can't be.
        V2VError: the exports do not tell it.
    """
    if options.bitmap is not None:
        arguments = options.input.arguments
        if options.input.kind != "disk" or not all("://" in each for each in arguments):
            raise UsageError(
                "--bitmap is of NBD exports", hint="-i disk nbd://HOST/EXPORT …, or leave it out"
            )
        for uri in arguments:
            await dirty_ranges(uri, options.bitmap)
        return "digests"
    if machine is not None:
        return "tracking" if machine.can_be_tracked else "digests"
    is_marked = all(
        disk.format == "qcow2" and disk.device is not None and disk.path is not None
        for disk in disks
    )
    return "checkpoints" if options.input.kind == "libvirt" and is_marked else "digests"


def _cost(source: SourceGuest, *, has_bitmap: bool) -> str:
    size = format_size(sum(disk.size for disk in source.disks))
    if has_bitmap:
        return (
            "each pass reads all that is dirty in the bitmap, which grows, and compares it with "
            f"digests of the last pass (at most {size})"
        )
    return (
        "this source does not tell what changes: each pass, the last one too, reads all data of "
        f"{size} and compares it with digests of the last pass"
    )


def _kept_input(options: InputOptions, password_file: Path | None) -> KeptInput:
    arguments = options.arguments
    if options.kind in ("disk", "libvirtxml", "ova", "vmx"):
        arguments = tuple(
            each if "://" in each else str(Path(each).absolute()) for each in arguments
        )
    return KeptInput(
        mode=options.mode,
        arguments=arguments,
        connection=options.connection,
        format=options.format,
        options=tuple(
            (name, str(Path(value).absolute()) if value and name in _FILES else value)
            for name, value in options.options
        ),
        transport=options.transport,
        password_file=None if password_file is None else str(password_file.absolute()),
    )


def _kept_output(options: OutputOptions) -> KeptOutput:
    return KeptOutput(
        mode=options.mode,
        allocation=options.allocation,
        connection=options.connection,
        format=options.format,
        name=options.name,
        options=options.options,
        storage=None if options.storage is None else str(Path(options.storage).absolute()),
    )
