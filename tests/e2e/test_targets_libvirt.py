"""-o libvirt from end to end: a guest converted, defined, started, and read again as a source."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import libvirtd
from tests.conftest import program, require
from tests.e2e.test_against_virt_v2v import ALLOWED, differences
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import digest
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.input.registry import parse_input
from v2v_async.options import ConvertOptions, GuestOptions, InputOptions, OutputOptions
from v2v_async.output.libvirt_calls import TargetConnection

pytestmark = [pytest.mark.appliance, pytest.mark.usefixtures("converting_once")]

REFERENCE = Path(__file__).parents[1] / "recorded" / "virt-v2v-2.2-o-libvirt.xml"
"""What virt-v2v 2.2 had libvirt define for the phony guest:

    virt-v2v -i disk system.img -o libvirt -oc qemu+unix:///session?socket=… -os images -on phony

on a host without KVM: the file that it wanted to define, which libvirt refused for ``type='kvm'``.
"""
BOOT_TIMEOUT_S = 400.0
WANTED: tuple[tuple[str, str], ...] = (
    *ALLOWED,
    (
        r"[-+] /domain type=(kvm|qemu)",
        "without KVM libvirt refuses the type kvm: a guest that runs slowly is better than none",
    ),
    (
        r"\+ /domain/features/(acpi|apic)",
        "virt-v2v found none on this host, since it asks for those of KVM guests",
    ),
    (
        r"- /domain/devices/disk device=disk type=volume"
        r"|- /domain/devices/disk/source pool=images volume=phony-sda"
        r"|\+ /domain/devices/disk device=disk type=file"
        r"|\+ /domain/devices/disk/source file=/.*/pool/phony-sda",
        "with AppArmor a guest does not start from volumes",
    ),
    (
        r"- /domain/devices/graphics type=sdl|\+ /domain/devices/graphics autoport=yes type=vnc",
        "libvirt's daemon has no screen for a window",
    ),
    (
        r"- /domain/devices/interface type=network"
        r"|- /domain/devices/interface/source network=default"
        r"|\+ /domain/devices/interface type=user",
        "a session has no network ‘default’",
    ),
    (r"- /domain/devices/vsock model=virtio", "where the host has no vsock"),
    (r"\+ /domain/uuid '[-0-9a-f]{36}'", "so that only this very guest is ever undefined"),
)
"""Lines of the difference, "-" virt-v2v's, "+" ours, as full matches."""


@pytest.fixture
def host(short_tmp: Path) -> Iterator[tuple[str, Path]]:
    """A session libvirtd with the pool ``images``: its URI, and the pool's directory."""
    require("libvirtd", "qemu-system-x86_64")
    with libvirtd.session_libvirtd(short_tmp) as uri, libvirtd.connection(uri) as libvirt:
        pool = short_tmp / "pool"
        pool.mkdir()
        if os.geteuid() == 0:
            user = pwd.getpwnam(libvirtd.USER)
            os.chown(pool, user.pw_uid, user.pw_gid)
        libvirt.storagePoolDefineXML(
            f"<pool type='dir'><name>images</name><target><path>{pool}</path></target></pool>"
        ).create()
        yield uri, pool


def convert(uri: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program("virt-v2v-async"), *more, "-o", "libvirt", "-oc", uri, "-os", "images"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.anyio
async def test_defined_and_started(
    host: tuple[str, Path],
    phony_guest: Path,
    short_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The XML is what virt-v2v's is; the conversion is replayed, the next test has a real one."""
    monkeypatch.setenv("PATH", f"{REPLAY}:{os.environ['PATH']}")
    uri, pool = host
    disk = phony_guest / "system.img"
    before = (digest(disk), disk.stat().st_mtime_ns)
    sent: list[bytes] = []
    define = TargetConnection.define

    async def noting(self: TargetConnection, xml: bytes) -> None:
        sent.append(xml)
        await define(self, xml)

    monkeypatch.setattr(TargetConnection, "define", noting)
    events: list[Event] = []
    options = GuestOptions(
        InputOptions("disk", (str(disk),)),
        ConvertOptions(),
        OutputOptions("libvirt", connection=uri, storage="images", name="phony"),
    )
    (short_tmp / "tmp").mkdir()
    await convert_guest(options, Reporter(events.append, "t"), tmpdir=short_tmp / "tmp")
    assert list((short_tmp / "tmp").iterdir()) == []
    assert (digest(disk), disk.stat().st_mtime_ns) == before
    assert os.listdir(pool) == ["phony-sda"]

    def virsh(*words: str) -> str:
        argv = ["virsh", "-q", "-c", uri, *words]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    defined = virsh("dumpxml", "--inactive", "phony")
    assert f"{pool}/phony-sda" in defined
    virsh("start", "phony")
    assert virsh("domstate", "phony").strip() == "running"
    virsh("destroy", "phony")

    back = parse_input(InputOptions("libvirt", ("phony",), connection=uri))
    await back.check(Reporter(events.append, "t"))
    source = await back.describe()
    assert [(d.source, d.format, d.controller) for d in source.disks] == [
        (f"{pool}/phony-sda", "raw", "virtio-blk")
    ]

    monkeypatch.undo()
    again = convert(uri, "-i", "disk", str(disk), "-on", "phony")
    assert again.returncode == 1
    assert "has a guest ‘phony’ already" in again.stderr
    assert os.listdir(pool) == ["phony-sda"]
    virsh("undefine", "phony")

    found = differences(REFERENCE.read_bytes(), sent[0])
    assert [d for d in found if not any(re.fullmatch(rule, d) for rule, _ in WANTED)] == []
    assert "+ /domain/devices/graphics autoport=yes type=vnc" in found


@pytest.mark.slow
def test_a_real_guest_boots(host: tuple[str, Path], sample_guest: Path) -> None:
    """By libvirt, from its own definition; it tells the checksums of what is on its disks."""
    uri, pool = host
    described = json.loads((sample_guest / "guest.json").read_text())
    disks = [str(sample_guest / name) for name in ("system.img", "data1.qcow2", "data2.img")]
    done = convert(uri, "-i", "disk", *disks, "-on", "sample", "-of", "qcow2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(pool)) == ["sample-sda", "sample-sdb", "sample-sdc"]
    with libvirtd.connection(uri) as libvirt:
        domain = libvirt.lookupByName("sample")
        domain.create()
        try:
            told = console(libvirt, domain, "V2V-ASYNC-GUEST-READY")
        finally:
            if domain.isActive():
                domain.destroy()
            domain.undefine()
    for disk in described["disks"]:
        assert disk["payload_sha256"] in told, told


def console(libvirt: Any, domain: Any, marker: str) -> str:
    """Return what the guest says on its serial line until ``marker``, which it must say."""
    # One that does not block would need libvirt's event loop.
    stream = libvirt.newStream(0)
    domain.openConsole(None, stream, 0)
    told = ""
    watch = threading.Timer(BOOT_TIMEOUT_S, domain.destroy)
    watch.start()
    try:
        while marker not in told:
            piece = stream.recv(4096)
            assert piece, f"it ended, or did not boot in time: {told}"
            told += piece.decode(errors="replace")
        return told
    finally:
        watch.cancel()
        stream.abort()
