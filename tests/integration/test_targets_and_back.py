"""From -i disk and from -i libvirtxml to every target and back: what was made is read, compared.

The guest is one that inspection and conversion accept. It was converted once (scripts/
phony-conversion); what that changed is written again to each overlay (tests/fault/replay), so that
what a target's disks must hold is known to the byte. Conversions anew: tests/e2e/test_targets_*.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lxml import etree

from tests.conftest import made_guest, require
from tests.fault.test_guest_faults import Place, quiet, replay, run_helpers
from tests.integration.servers import MIB
from tests.integration.test_output_libvirt import POOL, Host, start
from tests.integration.test_output_libvirt import daemon as daemon
from tests.integration.test_output_libvirt import host as host
from tests.integration.test_output_ovirt import DOMAIN, IMAGES, VM, VOLUMES
from tests.integration.test_output_ovirt import export as export
from tests.kubevirt_api import check as check_kubevirt
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.services.engine import PASSWORD, Engine
from tests.services.openstack import TestCloud
from tests.services.openstack_fixture import cloud as cloud
from tests.services.openstack_fixture import session_cloud as session_cloud
from tests.unit.test_targets_recorded import options as options_of_script
from v2v_async.events import Event, Reporter
from v2v_async.guest import convert_guest
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import (
    ConvertOptions,
    GuestOptions,
    InputOptions,
    MacMapping,
    NetworkOptions,
    OutputOptions,
)
from v2v_async.output.json_model import TargetDocument
from v2v_async.secret import Secret

pytestmark = pytest.mark.anyio
GENID = "8c4a1d9e-3f1b-4a53-9a4e-1f1b2c3d4e5f"
MAC = "52:54:00:12:34:56"
KINDS = ["disk", "libvirtxml"]
FORMATS = ["raw", "qcow2"]

# UEFI with secure boot, a TPM, two buses, a CD-ROM drive: more than a disk can say of a guest.
DOMAIN_XML = f"""<domain type='kvm'><name>web</name><genid>{GENID}</genid>
<memory unit='MiB'>768</memory><vcpu>4</vcpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><loader secure='yes'/></os>
<features><acpi/><apic/><smm state='on'/></features>
<cpu><topology sockets='1' dies='1' cores='2' threads='2'/></cpu>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='DISK1'/>
<target dev='sda' bus='sata'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='DISK2'/>
<target dev='sdb' bus='sata'/></disk>
<disk type='file' device='cdrom'><target dev='sdc' bus='sata'/></disk>
<interface type='bridge'><mac address='{MAC}'/><source bridge='br0'/><model type='e1000'/>
</interface>
<graphics type='vnc'/>
<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices></domain>"""


SIZES = (128 * MIB, 256 * MIB)


@pytest.fixture(scope="session")
def recorded() -> tuple[Path, Path]:
    """The phony guest, and what a conversion changed on it."""
    return made_guest("phony-guest", "--kind", "three-disk"), made_guest("phony-conversion")


class PhonyPlace(Place):
    """The phony guest's disks, and what a conversion changes on them."""

    def __init__(self, folder: Path, guest: Path, conversion: Path) -> None:
        super().__init__(folder)
        self.conversion = conversion
        for disk, name in zip(self.disks, ("system.img", "data2.qcow2"), strict=True):
            subprocess.run(["cp", "--sparse=always", str(guest / name), str(disk)], check=True)
        self.before = self.state()


@pytest.fixture
def place(
    short_tmp: Path, recorded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> PhonyPlace:
    replay(short_tmp, monkeypatch)
    monkeypatch.setenv("V2V_REPLAY_CHANGES", str(recorded[1]))
    return PhonyPlace(short_tmp, *recorded)


def given(place: Place, kind: str) -> InputOptions:
    if kind == "disk":
        return InputOptions("disk", tuple(map(str, place.disks)))
    xml = DOMAIN_XML
    for number, disk in enumerate(place.disks, 1):
        xml = xml.replace(f"DISK{number}", str(disk))
    path = place.tmp.parent / "web.xml"
    path.write_text(xml)
    return InputOptions("libvirtxml", (str(path),))


def wanted(place: PhonyPlace) -> list[bytes]:
    """What the conversion makes of the two disks."""
    found = []
    ranges = json.loads((place.conversion / "changes.json").read_text())
    assert ranges[0], "it changed something"
    for number, (disk, format_) in enumerate(zip(place.disks, FORMATS, strict=True), 1):
        plain = disk.with_suffix(".plain")
        argv = ["qemu-img", "convert", "-f", format_, "-O", "raw", str(disk), str(plain)]
        subprocess.run(argv, check=True)
        content = bytearray(plain.read_bytes())
        plain.unlink()
        with (place.conversion / f"disk-{number}").open("rb") as changed:
            for offset, length in ranges[number - 1]:
                content[offset : offset + length] = changed.read(length)
        found.append(bytes(content))
    return found


def assert_disks(place: PhonyPlace, paths: list[Path], format_: str) -> None:
    plain = place.tmp.parent / "plain"
    assert len(paths) == 2
    for path, content in zip(paths, wanted(place), strict=True):
        argv = ["qemu-img", "convert", "-f", format_, "-O", "raw", str(path), str(plain)]
        subprocess.run(argv, check=True)
        assert plain.read_bytes() == content, path
        assert_compact(path, plain, format_)
        plain.unlink()


def assert_compact(path: Path, plain: Path, format_: str) -> None:
    """Assert that it takes no more room than what qemu-img makes of the same content."""
    reference = plain.with_name("reference")
    argv = ["qemu-img", "convert", "-f", "raw", "-O", format_, str(plain), str(reference)]
    subprocess.run(argv, check=True)
    ours, theirs = (each.stat().st_blocks * 512 for each in (path, reference))
    reference.unlink()
    # Half a MiB: a file system rounds up, and keeps some room ahead of what is written.
    assert ours <= theirs + MIB // 2, (ours, theirs)
    assert ours < plain.stat().st_size * 3 // 4, "it is sparse"


async def convert(
    place: Place, kind: str, output: OutputOptions, networks: NetworkOptions | None = None
) -> tuple[TargetGuest, list[str]]:
    """Convert; return the guest and the warnings."""
    events: list[Event] = []
    options = GuestOptions(
        given(place, kind), ConvertOptions(network=networks or NetworkOptions()), output
    )
    target = await convert_guest(options, Reporter(events.append, "t"), tmpdir=place.tmp)
    assert list(place.tmp.iterdir()) == []
    place.assert_source_unchanged()
    return target, [event.text or "" for event in events if event.type == "warning"]


async def back(mode: str, *arguments: str, **fields: Any) -> SourceGuest:
    source = parse_input(InputOptions(mode, arguments, **fields))
    await source.check(quiet())
    return await source.describe()


def assert_guest(source: SourceGuest, kind: str, disks: list[Path], format_: str) -> None:
    """Assert that the guest that was made, read as a source, is the one that was given."""
    found = [(disk.source, disk.format, disk.size, disk.controller) for disk in source.disks]
    assert found == [
        (str(path), format_, size, "virtio-blk") for path, size in zip(disks, SIZES, strict=True)
    ]
    if kind == "disk":
        assert (source.memory, source.vcpus) == (2048 * MIB, 1)
        assert source.firmware == "unknown"  # libvirt's default goes without saying
        return
    assert (source.memory, source.vcpus, source.genid) == (768 * MIB, 4, GENID)
    topology = source.cpu_topology
    assert topology is not None
    assert (topology.sockets, topology.cores, topology.threads) == (1, 2, 2)
    assert source.firmware == "uefi"
    assert source.secure_boot is True
    assert [drive.type for drive in source.removables] == ["cdrom"]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
async def test_local(place: PhonyPlace, kind: str, format_: str) -> None:
    output = OutputOptions("local", storage=str(place.out), format=format_)
    networks = NetworkOptions(macs=(MacMapping(MAC, "network", "lan"),))
    await convert(place, kind, output, networks if kind == "libvirtxml" else None)
    disks = [place.out / "web-sda", place.out / "web-sdb"]
    assert_disks(place, disks, format_)
    source = await back("libvirtxml", str(place.out / "web.xml"))
    assert_guest(source, kind, disks, format_)
    nics = [(nic.mac, nic.vnet_type, nic.vnet, nic.model) for nic in source.nics]
    assert nics == [
        (None, "network", "default", "virtio")
        if kind == "disk"
        else (MAC, "network", "lan", "virtio")
    ]
    place.assert_nothing_left(outputs=("web-sda", "web-sdb", "web.xml"))
    # And once more: what was made can be converted, its disks whole.
    again = GuestOptions(
        InputOptions("libvirtxml", (str(place.out / "web.xml"),)),
        ConvertOptions(),
        replace(output, name="again"),
    )
    await convert_guest(again, quiet(), tmpdir=place.tmp)
    assert_disks(place, [place.out / "again-sda", place.out / "again-sdb"], format_)


@pytest.mark.parametrize("kind", KINDS)
async def test_libvirt(place: PhonyPlace, host: Host, kind: str) -> None:
    """Defined, started with all that it has, and read from libvirt."""
    if kind == "libvirtxml":
        require("swtpm", "swtpm_setup")
        if not Path("/usr/share/OVMF").exists():
            pytest.skip("no OVMF here")
    output = OutputOptions("libvirt", connection=host.uri, storage=POOL)
    # A session has no bridges, but stands in for networks.
    networks = NetworkOptions(macs=(MacMapping(MAC, "network", "default"),))
    _, warnings = await convert(place, kind, output, networks)
    disks = [host.pool / "web-sda", host.pool / "web-sdb"]
    assert_disks(place, disks, "raw")
    running = start(host)
    source = await back("libvirt", "web", connection=host.uri)
    assert_guest(source, kind, disks, "raw")
    if kind == "libvirtxml":
        assert running.xpath("//loader/@secure") == ["yes"]
        assert running.xpath("//tpm/@model") == ["tpm-crb"]
        assert running.xpath("//interface/mac/@address") == [MAC]
        assert any("new, empty TPM" in warning for warning in warnings)
        assert source.tpm is not None
    assert list(place.out.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_qemu(place: PhonyPlace, tmp_path: Path, kind: str) -> None:
    """What the script gives to qemu."""
    output = OutputOptions("qemu", storage=str(place.out), format="qcow2")
    await convert(place, kind, output)
    disks = [place.out / "web-sda", place.out / "web-sdb"]
    assert_disks(place, disks, "qcow2")
    found = options_of_script(place.out / "web.sh", tmp_path)
    for number, disk in enumerate(disks, 1):
        assert f"-drive if=none,id=disk{number},format=qcow2,file={disk}" in found
    is_rich = kind == "libvirtxml"
    assert f"-m {768 * 1024 if is_rich else 2048 * 1024}k" in found
    assert any("netdev" in each and MAC in each for each in found) == is_rich
    assert any(GENID in each for each in found) == is_rich
    assert any("if=pflash" in each for each in found) == is_rich
    assert any(
        "media=cdrom" in each or "scsi-cd" in each or "ide-cd" in each for each in found
    ) == (is_rich)


@pytest.mark.parametrize("kind", KINDS)
async def test_json(place: PhonyPlace, kind: str) -> None:
    pattern = (("json-disks-pattern", "%{GuestName}/%{DiskNo}"),)
    output = OutputOptions("json", storage=str(place.out), options=pattern)
    await convert(place, kind, output)
    disks = [place.out / "web" / "1", place.out / "web" / "2"]
    assert_disks(place, disks, "raw")
    text = (place.out / "web.json").read_bytes()
    TargetDocument.model_validate_json(text)
    found = json.loads(text)
    assert [(disk["file"], disk["size"]) for disk in found["disks"]] == [
        (str(disks[0]), SIZES[0]),
        (str(disks[1]), SIZES[1]),
    ]
    is_rich = kind == "libvirtxml"
    assert found["memory"] == (768 if is_rich else 2048) * MIB
    assert found["firmware"]["type"] == ("uefi" if is_rich else "bios")
    assert found["firmware"].get("secure-boot", False) == is_rich
    assert found.get("genid") == (GENID if is_rich else None)
    assert ("tpm" in found) == is_rich


@pytest.mark.parametrize("is_created", [True, False], ids=["made", "there already"])
@pytest.mark.parametrize("kind", KINDS)
async def test_kubevirt(place: PhonyPlace, tmp_path: Path, kind: str, is_created: bool) -> None:
    disks = [place.out / "web-sda", place.out / "web-sdb"]
    options: tuple[tuple[str, str], ...] = ()
    if not is_created:
        disks = [tmp_path / "pvc1", tmp_path / "pvc2"]
        for disk, size in zip(disks, SIZES, strict=True):
            disk.write_bytes(b"\xaa" * size)
        options = (*(("disk", str(disk)) for disk in disks), ("create", "false"))
    output = OutputOptions("kubevirt", storage=str(place.out), options=options)
    networks = NetworkOptions(macs=(MacMapping(MAC, "network", "pod"),))
    await convert(place, kind, output, networks)
    assert_disks(place, disks, "raw")
    machine = check_kubevirt(yaml.safe_load((place.out / "web.yaml").read_text()))
    spec = machine.spec.template.spec
    assert [volume.hostDisk.path for volume in spec.volumes] == list(map(str, disks))
    text = (place.out / "web.yaml").read_text()
    is_rich = kind == "libvirtxml"
    assert (MAC in text) == (GENID in text) == is_rich
    domain = yaml.safe_load(text)["spec"]["template"]["spec"]["domain"]
    assert ("tpm" in domain["devices"]) == is_rich
    firmware = domain["firmware"]["bootloader"]
    efi = {"secureBoot": True, "persistent": True}
    assert firmware == ({"efi": efi} if is_rich else {"bios": {}})


def rhv(export: Path) -> OutputOptions:
    return OutputOptions("rhv", storage=str(export), format="qcow2")


def vdsm(export: Path) -> OutputOptions:
    options = [("vdsm-vm-uuid", VM), ("vdsm-ovf-output", str(export / "ovf"))]
    for image, volume in zip(IMAGES, VOLUMES, strict=True):
        options += [("vdsm-image-uuid", image), ("vdsm-vol-uuid", volume)]
        (export / DOMAIN / "images" / image).mkdir(exist_ok=True)
    (export / "ovf").mkdir()
    return OutputOptions(
        "vdsm", storage=str(export / DOMAIN), format="qcow2", options=tuple(options)
    )


@pytest.mark.parametrize("made_by", [rhv, vdsm], ids=["rhv", "vdsm"])
@pytest.mark.parametrize("kind", KINDS)
async def test_ovirt(
    place: PhonyPlace, export: Path, kind: str, made_by: Callable[[Path], OutputOptions]
) -> None:
    """The OVF leads to the disks, and says the same of the guest."""
    _, warnings = await convert(place, kind, made_by(export))
    [path] = [*export.glob("ovf/*.ovf"), *export.glob(f"{DOMAIN}/master/vms/*/*.ovf")]
    root = etree.parse(path).getroot()
    ovf = root.nsmap["ovf"]
    disks = [
        export / DOMAIN / "images" / str(file.get(f"{{{ovf}}}href")) for file in root.iter("File")
    ]
    assert_disks(place, disks, "qcow2")
    for disk, size in zip(disks, SIZES, strict=True):
        meta = disk.with_name(f"{disk.name}.meta").read_text().splitlines()
        assert f"SIZE={size // 512}" in meta
        assert f"IMAGE={disk.parent.name}" in meta
    is_rich = kind == "libvirtxml"
    text = path.read_text()
    assert f"{768 if is_rich else 2048} MB of memory" in text
    assert root.xpath("//BiosType/text()") == (["3"] if is_rich else ["1"])
    assert (MAC in text) == is_rich
    assert any("TPM" in warning for warning in warnings) == is_rich


@pytest.mark.parametrize("kind", KINDS)
async def test_rhv_upload(place: PhonyPlace, engine: Engine, tmp_path: Path, kind: str) -> None:
    output = OutputOptions(
        "rhv-upload",
        connection=engine.url,
        storage="data-1",
        password=Secret(PASSWORD),
        format="qcow2",
    )
    networks = NetworkOptions(macs=(MacMapping(MAC, "network", "ovirtmgmt"),))
    await convert(place, kind, output, networks)
    [vm] = engine.vms.values()
    assert vm.name == "web"
    assert [engine.image(disk, tmp_path / "made") for disk in vm.disks] == wanted(place)
    is_rich = kind == "libvirtxml"
    assert ("ovirtmgmt" in vm.ovf) == (MAC in vm.ovf) == is_rich
    assert f"{768 if is_rich else 2048} MB of memory" in vm.ovf
    place.assert_nothing_left()


@pytest.mark.filterwarnings("ignore:Support for InfluxDB")
@pytest.mark.parametrize("kind", KINDS)
async def test_glance(place: PhonyPlace, cloud: TestCloud, kind: str) -> None:
    output = OutputOptions("glance", password=Secret(cloud.password), format="qcow2")
    await convert(place, kind, output)
    images = cloud.images()
    assert [image["name"] for image in images] == ["web", "web-disk2"]
    assert_disks(place, [cloud.image_file(image["id"]) for image in images], "qcow2")
    is_rich = kind == "libvirtxml"
    assert images[0]["min_ram"] == (768 if is_rich else 2048)
    assert images[0].get("hw_cpu_threads") == ("2" if is_rich else None)
    assert (images[0].get("hw_firmware_type") == "uefi") == is_rich
    place.assert_nothing_left()


@pytest.mark.filterwarnings("ignore:Support for InfluxDB")
@pytest.mark.parametrize("kind", KINDS)
async def test_openstack(place: PhonyPlace, cloud: TestCloud, kind: str) -> None:
    options = (("server-id", "appliance"), ("dev-disk-by-id", str(cloud.devices)))
    output = OutputOptions("openstack", password=Secret(cloud.password), options=options)
    await convert(place, kind, output)
    volumes = cloud.volumes()
    assert [volume["name"] for volume in volumes] == ["web-sda", "web-sdb"]
    for volume, content in zip(volumes, wanted(place), strict=True):
        with cloud.volume_file(volume["id"]).open("rb") as file:
            assert file.read(len(content)) == content
    properties = volumes[0]["volume_image_metadata"]
    assert (properties.get("hw_firmware_type") == "uefi") == (kind == "libvirtxml")
    place.assert_nothing_left()


@pytest.mark.parametrize("kind", KINDS)
async def test_null(place: PhonyPlace, kind: str) -> None:
    target, _ = await convert(place, kind, OutputOptions("null"))
    assert target.name == "web"
    assert (target.firmware == "uefi") == (kind == "libvirtxml")
    assert os.listdir(place.out) == []


@pytest.mark.parametrize("mode", ["libvirt", "null", "rhv", "vdsm"])
def test_by_the_helpers(place: PhonyPlace, host: Host, export: Path, mode: str) -> None:
    """A process for each step; tests/fault has the same of the other outputs."""
    match mode:
        case "libvirt":
            output = OutputOptions(mode, connection=host.uri, storage=POOL, format="qcow2")
        case "null":
            output = OutputOptions(mode)
        case _:
            output = {"rhv": rhv, "vdsm": vdsm}[mode](export)
    earlier = {*export.glob(f"{DOMAIN}/images/*/*")}
    argv: list[str] = []
    for option, value in (
        ("-oc", output.connection),
        ("-os", output.storage),
        ("-of", output.format),
    ):
        argv += [option, value] if value is not None else []
    for name, value in output.options:
        argv += ["-oo", f"{name}={value}"]
    run_helpers(place, mode, *argv)
    disks = {
        "libvirt": [host.pool / "web-sda", host.pool / "web-sdb"],
        "rhv": sorted(
            path
            for path in {*export.glob(f"{DOMAIN}/images/*/*")} - earlier
            if path.suffix != ".meta"
        ),
        "vdsm": [
            export / DOMAIN / "images" / image / volume
            for image, volume in zip(IMAGES, VOLUMES, strict=True)
        ],
        "null": [],
    }[mode]
    if mode == "rhv":  # named by UUIDs of the run's own
        disks.sort(key=qemu_size)
    if disks:
        assert_disks(place, disks, "qcow2")
    if mode == "libvirt":
        assert host.domains() == ["web"]
    place.assert_nothing_left()


def qemu_size(path: Path) -> int:
    argv = ["qemu-img", "info", "--output=json", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True)
    return int(json.loads(done.stdout)["virtual-size"])
