"""The domain XML against what the installed virt-v2v writes for the same guest.

Both convert the same phony guest; the two documents are then compared element by element. A
difference is a mistake here unless it is listed below, with its reason.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from pathlib import Path

import anyio
import pytest
from lxml import etree

from tests.conftest import require
from v2v_async import kvm, nbdkit
from v2v_async.convert import convert
from v2v_async.events import Event, Reporter
from v2v_async.input.image import FileImage
from v2v_async.input.overlay import source_command
from v2v_async.model import Nic, SourceDisk, SourceGuest, TargetGuest
from v2v_async.options import ConvertOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.v2vdir import OutputFile, V2VDir

# Lines of the difference, "-" virt-v2v's, "+" ours, as full matches.
ALLOWED: tuple[tuple[str, str], ...] = (
    (
        r"\+ /domain/clock offset=utc",
        "virt-v2v 2.2 leaves the clock to libvirt, whose default is utc; newer ones write it, and "
        "for Windows ‘localtime’ is needed",
    ),
    (
        r"\+ /domain/cpu mode=host-model",
        "qemu's default processor is too old for systems of today; virt-v2v 2.2 leaves it, newer "
        "ones write this",
    ),
    (
        r"\+ /domain/devices/disk/boot order=1",
        "virt-v2v 2.2 relies on the order of the disks; newer ones write it",
    ),
    (
        r"\+ /domain/devices/vsock/cid auto=yes",
        "each guest needs a context id of its own; without this element somebody must choose one",
    ),
)


def flatten(document: bytes) -> list[str]:
    """Return one line for each element: its path, attributes and text; sorted, since libvirt's
    order of elements has no meaning but within devices, where the target names tell it."""
    root = etree.fromstring(document)
    rows = []
    for element in root.iter(etree.Element):
        steps = [element, *element.iterancestors()]
        path = "/".join(str(step.tag) for step in reversed(steps))
        attributes = [f"{name!s}={value!s}" for name, value in sorted(element.attrib.items())]
        text = (element.text or "").strip()
        rows.append(" ".join([f"/{path}", *map(str, attributes), *([repr(text)] if text else [])]))
    return sorted(rows)


def differences(theirs: bytes, ours: bytes) -> list[str]:
    lines = difflib.unified_diff(flatten(theirs), flatten(ours), n=0, lineterm="")
    return [re.sub(r"^([-+])", r"\1 ", line) for line in lines if re.match(r"[-+]/", line)]


def test_the_comparison_sees_what_it_should() -> None:
    a = b"<domain><os><type machine='q35'>hvm</type></os><x/></domain>"
    b = b"<domain><x/><os><type machine='pc'>hvm</type></os></domain>"
    assert differences(a, a.replace(b"<x/>", b"<x></x>")) == []
    assert differences(a, b) == [
        "- /domain/os/type machine=q35 'hvm'",
        "+ /domain/os/type machine=pc 'hvm'",
    ]


@pytest.mark.appliance
@pytest.mark.anyio
async def test_the_same_guest(phony_guest: Path, short_tmp: Path) -> None:
    require("virt-v2v", "nbdkit")
    status = await kvm.probe_kvm()
    environment = kvm.appliance_environment(status)
    disk = short_tmp / "system.img"
    shutil.copy(phony_guest / "system.img", disk)
    their_directory, our_directory = short_tmp / "theirs", short_tmp / "ours"
    their_directory.mkdir()
    our_directory.mkdir()

    theirs = await anyio.run_process(
        ["virt-v2v", "-i", "disk", str(disk), "-o", "local", "-os", str(their_directory)],
        env={**os.environ, **environment},
        check=False,
    )
    assert theirs.returncode == 0, theirs.stderr.decode()
    # What test_output_directories.py expects of ours: the umask alone says who may read them.
    umask = os.umask(0o077)
    os.umask(umask)
    made = {path.name: path.stat() for path in their_directory.iterdir()}
    assert {name: status.st_mode & 0o777 for name, status in made.items()} == dict.fromkeys(
        ("system-sda", "system.xml"), 0o666 & ~umask
    )
    assert {status.st_uid for status in made.values()} == {os.geteuid()}

    v2vdir = V2VDir.create(short_tmp)
    events: list[Event] = []
    target = await _convert(v2vdir, _source(disk), environment, events)
    output = parse_output(OutputOptions(mode="local", storage=str(our_directory)))
    # The disk itself is not of interest here: an empty file stands in for it.
    final = our_directory / "system-sda"
    partial = our_directory / ".partial"
    partial.touch()
    v2vdir.add_output(OutputFile(temporary=str(partial), final=str(final)))
    await output.finalize(v2vdir, target, Reporter(events.append, "run"))

    found = differences(
        (their_directory / "system.xml").read_bytes().replace(b"/theirs/", b"/ours/"),
        (our_directory / "system.xml").read_bytes(),
    )
    surprising = [d for d in found if not any(re.fullmatch(rule, d) for rule, _ in ALLOWED)]
    assert surprising == []
    # What both say while they work is the same as well, but for the steps that only one has.
    said = {event.text for event in events if event.type == "message"}
    assert any(text and text.startswith("Converting ") for text in said)
    assert (
        f"] {next(t for t in said if t and t.startswith('Converting '))}" in theirs.stdout.decode()
    )


def _source(disk: Path) -> SourceGuest:
    """What virt-v2v takes for granted of a guest that is only a disk."""
    return SourceGuest(
        name="system",
        memory=2 << 30,
        vcpus=1,
        features=["acpi", "apic", "pae"],
        display="window",
        disks=[SourceDisk(index=1, source=str(disk), format="raw", size=disk.stat().st_size)],
        nics=[Nic()],
    )


async def _convert(
    v2vdir: V2VDir, source: SourceGuest, environment: dict[str, str], events: list[Event]
) -> TargetGuest:
    features = await nbdkit.probe()
    async with running_servers(v2vdir) as servers:
        for disk in source.disks:
            await servers.start(
                f"in{disk.index}",
                source_command(
                    features,
                    FileImage(Path(disk.source)),
                    v2vdir.source_socket(disk.index),
                    scratch=v2vdir.path,
                ),
                log=v2vdir.log("input", disk.index),
            )
        return await convert(
            v2vdir, source, ConvertOptions(), None, environment, Reporter(events.append, "run")
        )
