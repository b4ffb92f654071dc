"""The six steps, each on its own, on a v2v directory.

``guest.py`` runs them in one process, with servers that it watches; the ``helper-v2v-*`` programs
run one each, with servers that stay for the next one. What a step needs to know of the ones before
it is in the directory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from v2v_async import process
from v2v_async.convert.step import convert
from v2v_async.copy.step import copy
from v2v_async.emulation import emulation_environment
from v2v_async.errors import V2VError
from v2v_async.events import Bytes, Reporter
from v2v_async.input.contract import Input
from v2v_async.input.registry import parse_input
from v2v_async.kvm import KvmStatus, appliance_environment, probe_kvm
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import ConvertOptions, CopyOptions, InputOptions, OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.registry import parse_output
from v2v_async.server import Servers, running_servers
from v2v_async.v2vdir import V2VDir

# Removing half-made outputs is local and quick; a file system that hangs must not hold us for ever.
_UNDO_TIMEOUT_S = 60.0


@asynccontextmanager
async def step(name: str, v2vdir: V2VDir, reporter: Reporter) -> AsyncIterator[Reporter]:
    """Say that a step begins and how it ends; errors learn which step they are of."""
    mine = reporter.for_step(name)
    began = time.monotonic()
    v2vdir.update(phase=name)
    mine.emit("started")
    try:
        yield mine
    except V2VError as error:
        if error.step is None:
            logs = (v2vdir.log(name, error.disk), v2vdir.log(name))
            error.locate(step=name, log=next((log for log in logs if log.exists()), None))
        mine.emit("failed", error.message, duration_s=time.monotonic() - began)
        raise
    except anyio.get_cancelled_exc_class():
        mine.emit("cancelled", duration_s=time.monotonic() - began)
        raise
    mine.emit("finished", duration_s=time.monotonic() - began)


@asynccontextmanager
async def telling_guest(
    reporter: Reporter, guest: str, details: Mapping[str, object] | None = None
) -> AsyncIterator[Reporter]:
    """Say that work on a guest begins and how it ends; errors learn which guest it is."""
    mine = reporter.for_guest(guest)
    began = time.monotonic()
    mine.emit("started", details=None if details is None else dict(details))
    try:
        yield mine
    except V2VError as error:
        error.locate(guest=guest)
        mine.emit(
            "failed",
            error.message,
            hint=error.hint,
            offset=error.offset,
            log=str(error.log) if error.log else None,
            duration_s=time.monotonic() - began,
        )
        raise
    except anyio.get_cancelled_exc_class():
        mine.emit("cancelled", duration_s=time.monotonic() - began)
        raise
    mine.emit("finished", duration_s=time.monotonic() - began)


@asynccontextmanager
async def v2v_directory(
    tmpdir: Path | None,
    reporter: Reporter,
    undo: Callable[[V2VDir, Reporter], Awaitable[None]] | None = None,
) -> AsyncIterator[V2VDir]:
    """Have a v2v directory for all steps of a guest; after a failure, ``undo`` and keep the logs.

    It is made in ``tmpdir`` (default ``$TMPDIR``, else /var/tmp).
    """
    v2vdir = V2VDir.create(tmpdir)
    v2vdir.update(run=reporter.run)
    try:
        yield v2vdir
    except BaseException as error:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_UNDO_TIMEOUT_S):
            await stop_recorded(v2vdir)
            if undo is not None:
                await undo(v2vdir, reporter)
        if isinstance(error, Exception) and any(v2vdir.log_directory.iterdir()):
            if isinstance(error, V2VError):
                phase = v2vdir.state.phase
                error.locate(step=None if phase == "new" else phase, log=v2vdir.log_directory)
            v2vdir.keep_only_logs()
        else:
            v2vdir.remove()
        raise
    async with step("cleanup", v2vdir, reporter):
        v2vdir.remove()


async def look_at_source(source: Input, reporter: Reporter) -> SourceGuest:
    """Return what is known of a source before anything is served.

    Raises:
        SourceError: it can't be used.
    """
    try:
        await source.check(reporter.for_step("input"))
        return await source.describe()
    except V2VError as error:
        error.locate(step="input")
        raise


# What one step does, whoever runs it.


async def run_input(
    v2vdir: V2VDir, source: Input, servers: Servers, reporter: Reporter
) -> SourceGuest:
    """Serve the source's disks, which have been checked, and write ``metadata.in``."""
    async with step("input", v2vdir, reporter) as mine:
        guest = await source.setup(v2vdir, servers, mine)
        v2vdir.write_source(guest)
    return guest


async def run_convert(
    v2vdir: V2VDir,
    source: SourceGuest,
    options: ConvertOptions,
    output_name: str | None,
    reporter: Reporter,
) -> TargetGuest:
    """Convert on the source's overlays and write ``metadata.out``."""
    async with step("convert", v2vdir, reporter) as mine:
        kvm = await probe_kvm()
        _tell_about_kvm(kvm, mine)
        v2vdir.converting_mark.touch()
        try:
            environment = {**appliance_environment(kvm), **await emulation_environment(kvm)}
            return await convert(v2vdir, source, options, output_name, environment, mine)
        finally:
            v2vdir.converting_mark.unlink(missing_ok=True)


async def run_output_setup(
    v2vdir: V2VDir,
    output: Output,
    source: SourceGuest,
    name: str,
    servers: Servers,
    reporter: Reporter,
) -> None:
    """Make and serve the empty target disks."""
    async with step("output", v2vdir, reporter) as mine:
        await output.setup(v2vdir, source, name, servers, mine)


async def run_copy(
    v2vdir: V2VDir, source: SourceGuest, options: CopyOptions, reporter: Reporter
) -> list[Bytes]:
    """Copy all disks at once."""
    async with step("copy", v2vdir, reporter) as mine:
        return await copy(v2vdir, source, options, mine)


async def run_finalize(
    v2vdir: V2VDir, output: Output, target: TargetGuest, reporter: Reporter
) -> None:
    """Make the target guest; its disks' servers have been stopped."""
    async with step("finalize", v2vdir, reporter) as mine:
        await output.finalize(v2vdir, target, mine)


# The helpers: one step in a process of its own.


async def input_step(path: Path, options: InputOptions, reporter: Reporter) -> None:
    """``helper-v2v-input-TYPE``: the servers stay when this returns."""
    source = parse_input(options)
    v2vdir = V2VDir(path.absolute())
    v2vdir.adopt()
    await source.check(reporter.for_step("input"))
    async with running_servers(v2vdir, detached=True) as servers:
        await run_input(v2vdir, source, servers, reporter)


async def convert_step(
    path: Path, options: ConvertOptions, output_name: str | None, reporter: Reporter
) -> None:
    """``helper-v2v-convert``."""
    v2vdir = V2VDir(path.absolute())
    source = v2vdir.read_source()
    await run_convert(v2vdir, source, options, output_name, reporter.for_guest(source.name))


async def output_setup_step(path: Path, options: OutputOptions, reporter: Reporter) -> None:
    """``helper-v2v-output-TYPE setup``: the servers stay when this returns."""
    output = parse_output(options)
    v2vdir = V2VDir(path.absolute())
    source = v2vdir.read_source()
    mine = reporter.for_guest(source.name)
    await output.check(mine)
    try:
        async with running_servers(v2vdir, detached=True) as servers:
            await run_output_setup(
                v2vdir, output, source, options.name or source.name, servers, mine
            )
    except BaseException:
        with anyio.CancelScope(shield=True):
            await output.abandon(v2vdir, mine)
        raise


async def copy_step(path: Path, options: CopyOptions, reporter: Reporter) -> None:
    """``helper-v2v-copy``."""
    v2vdir = V2VDir(path.absolute())
    source = v2vdir.read_source()
    await run_copy(v2vdir, source, options, reporter.for_guest(source.name))


async def output_finalize_step(path: Path, options: OutputOptions, reporter: Reporter) -> None:
    """``helper-v2v-output-TYPE final``: stops the target's servers first."""
    output = parse_output(options)
    v2vdir = V2VDir(path.absolute())
    target = v2vdir.read_target()
    await stop_recorded(v2vdir, prefix="out")
    await run_finalize(v2vdir, output, target, reporter.for_guest(target.source.name))


async def stop_recorded(v2vdir: V2VDir, prefix: str = "") -> int:
    """End the processes of ``state.json`` whose socket's name begins so; return how many ran."""
    ended = 0
    for record in reversed(v2vdir.state.processes):
        if not Path(record.socket or "").name.startswith(prefix):
            continue
        ended += await process.end_pid(record.pid, record.started, naming=str(v2vdir.path))
        if record.socket:
            Path(record.socket).unlink(missing_ok=True)
        v2vdir.forget_process(record.pid)
    return ended


def _tell_about_kvm(kvm: KvmStatus, reporter: Reporter) -> None:
    if kvm.state in ("denied", "broken"):
        reporter.warning(
            f"KVM is there but can't be used ({kvm.reason}): the conversion runs emulated, which "
            "is slower"
        )
    elif kvm.state == "absent":
        reporter.message(f"no KVM ({kvm.reason}): the conversion runs emulated, which is slower")
