"""--print-source of VMX files: word for word what the real virt-v2v prints."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import program, require

_START = "Source guest information"
# The disks that the files below name. virt-v2v opens them, though it prints nothing of them.
_DISKS = ("a.vmdk", "b.vmdk", "c d.vmdk", "sub/e.vmdk", "é.vmdk")

_ESXI = """\
.encoding = "UTF-8"
config.version = "8"
virtualHW.version = "13"
nvram = "web.nvram"
pciBridge0.present = "TRUE"
svga.present = "TRUE"
svga.autodetect = "TRUE"
displayName = "web server"
guestOS = "rhel7-64"
memSize = "4096"
numvcpus = "4"
cpuid.coresPerSocket = "2"
scsi0.virtualDev = "pvscsi"
scsi0.present = "TRUE"
scsi0:0.deviceType = "scsi-hardDisk"
scsi0:0.fileName = "a.vmdk"
scsi0:0.present = "TRUE"
ethernet0.virtualDev = "vmxnet3"
ethernet0.networkName = "VM Network"
ethernet0.addressType = "generated"
ethernet0.generatedAddress = "00:0c:29:11:22:33"
ethernet0.present = "TRUE"
ide1:0.fileName = "emptyBackingString"
ide1:0.deviceType = "atapi-cdrom"
ide1:0.present = "TRUE"
ide1:0.startConnected = "FALSE"
floppy0.present = "FALSE"
vm.genid = "-6157443282323837103"
vm.genidX = "3838338842229283213"
uuid.bios = "56 4d 1f 6c 8a 7f 0a 0b-9d 7a 64 2e 0b 1a 57 12"
"""
_ONE = 'displayName = "x"\nscsi0:0.fileName = "a.vmdk"\n'

FILES = {
    "a guest of ESXi": _ESXI,
    "with CR at the ends": _ESXI.replace("\n", "\r\n"),
    "keys in capitals": "\n".join(
        line.partition(" ")[0].upper() + " " + line.partition(" ")[2] for line in _ESXI.split("\n")
    ),
    "almost nothing": _ONE,
    "no name": 'scsi0:0.fileName = "a.vmdk"\n',
    "escapes in the name": _ONE.replace('"x"', '"a |22b|22 |7C |c3|a9"'),
    "a name in UTF-8": _ONE.replace('"x"', '"Jürgens Rechner €"'),
    "comments and a hash-bang": '#!/usr/bin/vmware\n# a = "b"\n\n' + _ONE,
    "lines that make no sense": _ONE + "nonsense\n= =\nmemSize 12\n",
    "a key twice": _ONE + 'memSize = "100"\nmemsize = "200"\n',
    "UEFI": _ONE + 'firmware = "efi"\n',
    "BIOS, said": _ONE + 'firmware = "bios"\n',
    "a firmware that is not known": _ONE + 'firmware = "EFI"\n',
    "topology, even": _ONE + 'numvcpus = "8"\ncpuid.coresPerSocket = "4"\n',
    "topology, odd": _ONE + 'numvcpus = "7"\ncpuid.coresPerSocket = "4"\n',
    "topology, too many cores": _ONE + 'numvcpus = "2"\ncpuid.coresPerSocket = "4"\n',
    "half a genid": _ONE + 'vm.genid = "123"\n',
    "a genid of small numbers": _ONE + 'vm.genid = "1"\nvm.genidX = "-1"\n',
    "sound sb16": _ONE + 'sound.present = "TRUE"\nsound.virtualDev = "sb16"\n',
    "sound es1371": _ONE + 'sound.virtualDev = "es1371"\n',
    "sound hdaudio": _ONE + 'sound.virtualDev = "hdaudio"\n',
    "a sound device that is not known": _ONE + 'sound.virtualDev = "theremin"\n',
    "sound that is not present": _ONE + 'sound.present = "FALSE"\nsound.virtualDev = "sb16"\n',
    "disks of all buses, mixed up": """\
displayName = "x"
ide0:1.fileName = "a.vmdk"
ide0:1.deviceType = "ata-hardDisk"
nvme0:0.fileName = "b.vmdk"
sata0:1.fileName = "c d.vmdk"
scsi1:0.fileName = "sub/e.vmdk"
scsi0:10.fileName = "a.vmdk"
scsi0:2.fileName = "b.vmdk"
scsi0:2.deviceType = "disk"
""",
    "SCSI device types": """\
displayName = "x"
scsi0:0.fileName = "a.vmdk"
scsi0:0.deviceType = "plainDisk"
scsi0:1.fileName = "b.vmdk"
scsi0:1.deviceType = "RAWDISK"
scsi0:2.fileName = "b.vmdk"
scsi0:2.deviceType = "scsi-hardDisk"
scsi0:3.fileName = "/dev/sg0"
scsi0:3.deviceType = "scsi-passthru"
scsi0:4.fileName = "gone.vmdk"
scsi0:4.present = "FALSE"
scsi0:5.deviceType = "disk"
""",
    "a controller that is not present": _ONE + 'scsi0.present = "FALSE"\n',
    "names with spaces and umlauts": 'displayName = "x"\nscsi0:0.fileName = "c d.vmdk"\n'
    'scsi0:1.fileName = "é.vmdk"\n',
    "IDE CD-ROMs of every kind": _ONE + 'ide0:1.deviceType = "cdrom-image"\n'
    'ide0:1.fileName = "a.iso"\nide1:0.deviceType = "atapi-cdrom"\n'
    'ide1:1.deviceType = "CDROM-raw"\nide0:0.deviceType = "cdrom-image"\n'
    'ide0:0.present = "FALSE"\n',
    "NICs, mixed up": _ONE + 'ethernet10.networkName = "ten"\nethernet2.networkName = "two"\n'
    'ethernet2.virtualDev = "E1000"\nethernet1.virtualDev = "e1000e"\n'
    'ethernet1.connectionType = "bridged"\nethernet0.connectionType = "nat"\n'
    'ethernet0.generatedAddress = "00:0C:29:AA:BB:CC"\nethernet3.present = "FALSE"\n'
    'ethernet3.networkName = "gone"\nethernet4.virtualDev = "VLANCE"\n',
    "a NIC of vCenter": _ONE + 'ethernet0.addressType = "vpx"\n'
    'ethernet0.generatedAddress = "00:50:56:aa:bb:cc"\nethernet0.dvs.switchId = "50 1f"\n'
    'ethernet0.dvs.portgroupId = "dvportgroup-12"\n',
}

RICHER = {
    "an address that a person set": (
        _ONE + 'ethernet0.addressType = "static"\nethernet0.address = "00:50:56:00:00:01"\n',
        {'\tNetwork "ethernet0"'},
        {'\tNetwork "ethernet0" mac: 00:50:56:00:00:01'},
    ),
    "an IDE disk of VMware Workstation": (
        _ONE + 'ide0:0.present = "TRUE"\nide0:0.fileName = "b.vmdk"\n',
        set(),
        {"\t1 [ide]"},
    ),
    "drives that are not on IDE": (
        _ONE + 'sata0:1.deviceType = "cdrom-image"\nfloppy0.fileName = "a.flp"\n',
        set(),
        {"\tCD-ROM [sata] in slot 1", "\tFloppy [floppy] in slot 0"},
    ),
}
"""What we tell more of, and how: (file, lines only of virt-v2v, lines only of ours)."""


AT_ONCE = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vmx")
    (path / "sub").mkdir()
    for name in _DISKS:
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "vmdk", str(path / name), "1M"], check=True
        )
    return path


def printed(argv: list[str]) -> str:
    environment = {
        **os.environ,
        "LIBGUESTFS_BACKEND": "direct",
        "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
    }
    done = subprocess.run(
        ["timeout", "60", *argv], env=environment, stdin=subprocess.DEVNULL, capture_output=True
    )
    out = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert _START in out
    return out[out.index(_START) :].rstrip("\n")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Iterator[dict[str, Future[str]]]:
    """What virt-v2v prints. Each start of it sleeps for a second or two: they do so together."""
    require("virt-v2v")
    for name, text in {**FILES, **{name: row[0] for name, row in RICHER.items()}}.items():
        (folder / f"{name}.vmx").write_text(text, newline="")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(printed, ["virt-v2v", *words(folder, name)])
            for name in (*FILES, *RICHER)
        }


def words(folder: Path, name: str) -> list[str]:
    return ["--print-source", "-i", "vmx", str(folder / f"{name}.vmx")]


def both(folder: Path, name: str, theirs: dict[str, Future[str]]) -> tuple[str, str]:
    said = theirs[name].result()
    return said, printed([*program("virt-v2v-async"), *words(folder, name)])


@pytest.mark.parametrize("name", FILES)
def test_as_virt_v2v_prints_it(folder: Path, name: str, theirs: dict[str, Future[str]]) -> None:
    said, ours = both(folder, name, theirs)
    assert ours == said


@pytest.mark.parametrize("name", RICHER)
def test_what_virt_v2v_leaves_out_is_all_that_differs(
    folder: Path, name: str, theirs: dict[str, Future[str]]
) -> None:
    _, only_theirs, only_ours = RICHER[name]
    said, ours = (set(text.splitlines()) for text in both(folder, name, theirs))
    assert said - ours - {""} == only_theirs
    assert ours - said - {""} == only_ours
