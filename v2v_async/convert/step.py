"""The convert step, from the first line to ``metadata.out``.

One start of the appliance does everything: virt-v2v-in-place converts, trims the file systems (so
that the copy finds holes where nothing is used) and tells what the target needs.

::

    metadata.in, in1 in2 … ──> source.xml ──> virt-v2v-in-place ──> in1 in2 … converted and trimmed
                                                  └─> properties ──> metadata.out
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL

import anyio
from anyio.abc import Process

from v2v_async import process, virt_v2v_in_place
from v2v_async.convert.buses import assign_buses
from v2v_async.convert.hints import hint_for
from v2v_async.convert.inspector_xml import parse_inspector_xml
from v2v_async.convert.networks import NetworkMap
from v2v_async.convert.properties import (
    target_firmware,
    to_firmware,
    to_guestcaps,
    to_inspection,
)
from v2v_async.convert.secrets import secret_files
from v2v_async.convert.source_xml import source_xml
from v2v_async.convert.transcript import Transcript
from v2v_async.errors import ConversionError
from v2v_async.events import Reporter
from v2v_async.model import Firmware, Inspection, SourceGuest, TargetGuest
from v2v_async.options import ConvertOptions
from v2v_async.redact import redact_argv
from v2v_async.v2vdir import V2VDir, record_of
from v2v_async.virt_v2v_in_place import PROGRAM

END_GRACE_S = 10.0
"""From SIGTERM to SIGKILL. It then ends qemu and two servers a disk, and removes their folders."""

LEFTOVER_GRACE_S = 3.0
"""For its servers, which it ends without waiting for them: until then they hold its outputs open.
Nothing is lost with them; they pass writes on at once."""

# sockaddr_un.sun_path without its NUL (unix(7)), less what virt-v2v puts under TMPDIR.
_MAX_SCRATCH_LENGTH = 107 - len("/v2vqemunbd.XXXXXX/in999")


async def convert(
    v2vdir: V2VDir,
    source: SourceGuest,
    options: ConvertOptions,
    output_name: str | None,
    environment: Mapping[str, str],
    reporter: Reporter,
) -> TargetGuest:
    """Convert the guest on ``in1`` … and write ``metadata.out``; return what is in it.

    ``environment`` is added to ours: the work-around for a KVM that does not work. When cancelled,
    the program and all that it started are ended and their temporary files removed.

    Raises:
        ConversionError: the guest can't be converted; its disks are in an unknown state.
        UsageError: a mapping or a selector is wrong, or the installed version lacks an option.
        DependencyError: virt-v2v-in-place is not installed.
    """
    networks = NetworkMap(options.network)
    for mac in networks.unused_macs(source.nics):
        reporter.warning(f"--mac {mac}: the guest has no such interface")
    features = await virt_v2v_in_place.probe()
    guest_xml, output_xml = v2vdir.path / "source.xml", v2vdir.path / "inspection.xml"
    output_xml.unlink(missing_ok=True)
    guest_xml.write_bytes(source_xml(source, v2vdir.source_socket))
    with secret_files(v2vdir.path, options.keys, options.customize) as safe:
        argv = virt_v2v_in_place.command(
            features,
            guest_xml,
            options,
            keys=safe.keys,
            customize=safe.customize,
            output_xml=output_xml,
        )
        transcript = await _run(v2vdir, argv, options, environment, reporter)
    log = v2vdir.log("convert")
    try:
        target = _target(source, output_name, networks, transcript, output_xml, reporter)
    except ValueError as error:
        raise ConversionError(
            f"{PROGRAM} ended well, but {error}",
            hint="this version of virt-v2v may be too new for this v2v-async: please report it",
            phase=transcript.phase,
            step="convert",
            log=log,
        ) from error
    v2vdir.write_target(target)
    return target


async def _run(
    v2vdir: V2VDir,
    argv: list[str],
    options: ConvertOptions,
    environment: Mapping[str, str],
    reporter: Reporter,
) -> Transcript:
    scratch = _make_scratch(v2vdir)
    log = v2vdir.log("convert")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    transcript = Transcript(descriptor, reporter, verbose=options.verbose)
    transcript.write_log(f"$ {process.command_line(argv)}")
    child: Process | None = None
    sockets: set[Path] = set()
    try:
        child = await process.start(
            argv,
            # 0 is our standard input: passphrases come from there.
            stdin=0 if options.keys_from_stdin else DEVNULL,
            environment=virt_v2v_in_place.environment(scratch, environment),
            with_children=True,
        )
        v2vdir.add_process(record_of(child.pid, PROGRAM, redact_argv(argv)))
        await _follow(child, transcript)
        status = process.unguarded(await child.wait())
    finally:
        with anyio.CancelScope(shield=True):
            if child is not None:
                sockets = process.bound_sockets(child.pid)
                await process.end(child, grace_s=END_GRACE_S)
                v2vdir.forget_process(child.pid)
                await _close(child)
        os.close(descriptor)
        _remove_temporary(v2vdir, scratch, transcript, sockets)
    if status != 0:
        raise _failed(status, transcript, log)
    return transcript


async def _follow(child: Process, transcript: Transcript) -> None:
    """Read both outputs until the program has ended and they have been read."""
    assert child.stdout is not None
    assert child.stderr is not None

    async def end_what_stays() -> None:
        await child.wait()
        await anyio.sleep(LEFTOVER_GRACE_S)
        await process.end(child, grace_s=0)

    async with anyio.create_task_group() as group:
        group.start_soon(end_what_stays)
        async with anyio.create_task_group() as readers:
            readers.start_soon(transcript.follow_stdout, child.stdout)
            readers.start_soon(transcript.follow_stderr, child.stderr)
        group.cancel_scope.cancel()
    await child.wait()
    transcript.properties.finish()


def _target(
    source: SourceGuest,
    output_name: str | None,
    networks: NetworkMap,
    transcript: Transcript,
    output_xml: Path,
    reporter: Reporter,
) -> TargetGuest:
    values = transcript.properties
    inspection: Inspection
    found: Firmware
    if output_xml.exists():
        inspection, found = parse_inspector_xml(output_xml.read_bytes())
    else:
        inspection = to_inspection(values.inspection)
        found = to_firmware(values.firmware)
    guestcaps = to_guestcaps(values.guestcaps, is_windows=inspection.type == "windows")
    buses, warnings = assign_buses(source.disks, source.removables, guestcaps)
    for warning in warnings:
        reporter.warning(warning)
    firmware = target_firmware(source, found)
    if firmware == "unknown":
        reporter.warning(f"{PROGRAM} did not tell the firmware: BIOS is taken for it")
    return TargetGuest(
        name=output_name if output_name is not None else source.name,
        source=source,
        guestcaps=guestcaps,
        inspection=inspection,
        firmware="uefi" if firmware == "uefi" else "bios",
        secure_boot=firmware == "uefi" and source.secure_boot,
        buses=buses,
        boot_disk=_boot_disk(source, values.boot_device),
        nics=[networks.map(nic) for nic in source.nics],
    )


def _boot_disk(source: SourceGuest, device: int | None) -> int | None:
    """Return the index of the boot disk: as it was told, else the first, as a BIOS would take."""
    indexes = [disk.index for disk in source.disks]
    if device is not None and device < len(indexes):
        return indexes[device]
    return indexes[0] if indexes else None


def _failed(status: int, transcript: Transcript, log: Path) -> ConversionError:
    said = "\n".join(transcript.errors)
    while_ = f" while it said ‘{transcript.phase}’" if transcript.phase else ""
    why = said.strip() or process.describe_status(status)
    return ConversionError(
        f"{PROGRAM} failed{while_}: {why}",
        hint=hint_for(said) or f"the log says more: {log}",
        phase=transcript.phase,
        step="convert",
        log=log,
    )


def _make_scratch(v2vdir: V2VDir) -> Path:
    """Return a new directory for its temporary files: short enough for its sockets."""
    if len(os.fsencode(v2vdir.path / "tmp.XXXXXXXX")) <= _MAX_SCRATCH_LENGTH:
        return Path(tempfile.mkdtemp(prefix="tmp.", dir=v2vdir.path))
    scratch = Path(tempfile.mkdtemp(prefix="v2v-async.", dir="/tmp"))
    v2vdir.update(files=[*v2vdir.state.files, str(scratch)])
    return scratch


def _remove_temporary(
    v2vdir: V2VDir, scratch: Path, transcript: Transcript, sockets: Iterable[Path]
) -> None:
    """Remove what it left: after SIGKILL that is all it had.

    libguestfs's own socket is in a directory that only the log tells, and that only once qemu has
    been started; before that, ``sockets`` has it: those that were open when the program was ended.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    if str(scratch) in v2vdir.state.files:
        v2vdir.update(files=[path for path in v2vdir.state.files if path != str(scratch)])
    folders = {path.parent for path in sockets if path.parent.name.startswith("libguestfs")}
    if transcript.socket_directory is not None:
        folders.add(Path(transcript.socket_directory))
    for folder in folders:
        with suppress(OSError):
            if folder.lstat().st_uid == os.geteuid():
                shutil.rmtree(folder)


async def _close(child: Process) -> None:
    """Close both pipes; asyncio lets go of one at its end, when all its writers are gone."""
    for stream in (child.stdout, child.stderr):
        if stream is None:
            continue
        with anyio.move_on_after(1.0), suppress(anyio.ClosedResourceError):
            async for _ in stream:
                pass
        await stream.aclose()
