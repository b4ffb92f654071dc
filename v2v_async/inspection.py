"""Look into a guest without converting it, whatever it comes from.

::

    check ──> input ──> inspect ──> clean up
              overlays  an appliance, the disks read-only
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from v2v_async import appliance
from v2v_async.connection import connected, count_data
from v2v_async.convert.inspector_xml import inspector_xml
from v2v_async.convert.properties import to_inspection
from v2v_async.convert.secrets import secret_files
from v2v_async.emulation import emulation_environment
from v2v_async.errors import SourceError
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.kvm import appliance_environment, probe_kvm
from v2v_async.model import InspectedDisk, InspectedGuest, SourceGuest
from v2v_async.options import InspectOptions
from v2v_async.server import running_servers
from v2v_async.steps import look_at_source, run_input, step, telling_guest, v2v_directory
from v2v_async.v2vdir import V2VDir


async def inspect_guest(
    options: InspectOptions, reporter: Reporter, *, tmpdir: Path | None = None
) -> InspectedGuest:
    """Return what is inside a guest; its disks are only read.

    Raises:
        V2VError: with step and log, as far as they apply; also where there is no operating system,
            or several and ``root`` does not say which.
    """
    source_input = parse_input(options.input)
    source = await look_at_source(source_input, reporter)
    async with (
        telling_guest(reporter, source.name) as mine,
        v2v_directory(tmpdir, mine) as v2vdir,
        running_servers(v2vdir) as servers,
    ):
        source = await run_input(v2vdir, source_input, servers, mine)
        async with step("inspect", v2vdir, mine):
            found = await _inspect(v2vdir, source, options)
    return found


def to_xml(found: InspectedGuest) -> str:
    """Return it as virt-v2v-inspector's document."""
    return inspector_xml(
        found.source,
        found.inspection,
        found.firmware,
        allocated={disk.index: disk.allocated for disk in found.disks},
        program="v2v-async inspect",
    )


async def _inspect(v2vdir: V2VDir, source: SourceGuest, options: InspectOptions) -> InspectedGuest:
    kvm = await probe_kvm()
    environment = {**appliance_environment(kvm), **await emulation_environment(kvm)}
    sockets = [v2vdir.source_socket(disk.index) for disk in source.disks]
    with secret_files(v2vdir.path, options.keys, ()) as safe:
        keys = [_key(selector) for selector in safe.keys]
        found = await appliance.inspect(sockets, keys, options.root, environment)
    if "system" not in found:
        raise _no_system(found, options.root)
    disks = []
    for disk, socket in zip(source.disks, sockets, strict=True):
        async with connected(str(socket)) as connection:
            allocated = await count_data(connection)
        disks.append(InspectedDisk(index=disk.index, size=disk.size, allocated=allocated))
    return guest_of(source, disks, found)


def guest_of(
    source: SourceGuest, disks: Sequence[InspectedDisk], found: dict[str, Any]
) -> InspectedGuest:
    """Return a guest from what the appliance told (:func:`appliance.inspect`)."""
    system = found["system"]
    firmware = source.firmware
    if firmware == "unknown":
        firmware = "uefi" if found["has_esp"] else "bios"
    return InspectedGuest(
        source=source,
        disks=list(disks),
        firmware=firmware,
        inspection=to_inspection({name: str(value) for name, value in system.items()}),
        hostname=None if system["hostname"] == "unknown" else system["hostname"],
        mountpoints=system["mountpoints"],
        filesystems=found["filesystems"],
        roots=found["roots"],
        locked=found["locked"],
    )


def _key(selector: str) -> list[str]:
    """Return ID, kind and file of a selector that has no secret in it."""
    identifier, _, rest = selector.partition(":")
    kind, _, path = rest.partition(":")
    return [identifier, kind, path]


def _no_system(found: dict[str, Any], root: str) -> SourceError:
    roots = found["roots"]
    if roots:
        several = root == "single"
        return SourceError(
            f"the guest has several operating systems: {', '.join(roots)}"
            if several
            else f"--root: ‘{root}’ is not the root of an operating system of the guest",
            hint=f"write --root first or --root {roots[-1]}"
            if several
            else f"it has {', '.join(roots)}",
        )
    if found["locked"]:
        return SourceError(
            f"no operating system was found, and {', '.join(found['locked'])} can't be opened: "
            "no --key is its own",
            hint="add --key ID:file:FILE for each; an ID is a device, a UUID or all",
        )
    told = ", ".join(f"{device} {type_}" for device, type_ in found["filesystems"].items())
    return SourceError(
        f"no operating system was found in the guest; its disks hold {told or 'nothing'}",
        hint="give all disks of the guest, the one it boots from first",
    )
