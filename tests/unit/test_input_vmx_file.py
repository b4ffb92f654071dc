"""VMX files: their syntax, the guest in them, and that nothing in one makes a traceback."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from v2v_async.errors import SourceError
from v2v_async.input.vmx.file import MAX_SIZE, parse_vmx
from v2v_async.input.vmx.hardware import VmxGuest, read_guest
from v2v_async.model import CpuTopology, Nic, SourceGuest, SourceRemovable, SourceTpm

DISK = 'scsi0:0.fileName = "a.vmdk"\n'


def guest_of(text: str, default_name: str = "file") -> VmxGuest:
    return read_guest(parse_vmx(text.encode(), "the file"), default_name)


def source_of(text: str) -> SourceGuest:
    return guest_of(DISK + text).guest


def test_keys_have_no_case_and_values_keep_theirs() -> None:
    vmx = parse_vmx(b'DisplayName = "A b"\r\n\r\n# c = "d"\n  memsize="12"  \n', "it")
    assert vmx.get("displayname") == "A b"
    assert vmx.number("memSize") == 12
    assert vmx.get("c") is None
    assert vmx.warnings == []


def test_escapes_are_bytes() -> None:
    vmx = parse_vmx(b'a = "|22x|7C |c3|a9 |zz |"\n', "it")
    assert vmx.get("a") == '"x| é |zz |'


def test_what_is_not_present_is_gone_with_all_in_it() -> None:
    vmx = parse_vmx(
        b'a.present = "False"\na.b = "1"\na.b.c = "2"\nab.c = "3"\nb.a.present = "FALSE"\n'
        b'b.a.x = "4"\nb.x = "5"\npresent = "FALSE"\n',
        "it",
    )
    assert set(vmx.values) == {"ab.c", "b.x", "present"}


def test_the_first_of_two_counts_and_odd_lines_are_told() -> None:
    vmx = parse_vmx(b'a = "1"\nA = "2"\nnonsense\nb = 3\n', "it")
    assert vmx.values == {"a": "1"}
    assert [warning.partition(": ")[2] for warning in vmx.warnings] == [
        "line 2: ‘a’ is there already; ignored",
        'line 3 is not KEY = "VALUE" and is ignored',
        'line 4 is not KEY = "VALUE" and is ignored',
    ]


def test_thousands_of_odd_lines_are_told_once() -> None:
    vmx = parse_vmx(b'a = "1"\n' + b"nonsense\n" * 1000, "it")
    assert len(vmx.warnings) == 6
    assert vmx.warnings[-1] == "it: 995 more lines are ignored"


@pytest.mark.parametrize(
    ("told", "raw", "value", "warned"),
    [
        ("UTF-8", "é".encode(), "é", False),
        ("windows-1252", b"\xe9\x80", "é€", False),
        ("GBK", "中文".encode("gbk"), "中文", False),
        ("UTF-8", b"\xe9", "é", True),
        ("no-such", "é".encode(), "é", True),
        ("zip", b"x", "x", True),
        ("windows-1252", b"\x81", "\x81", True),
    ],
)
def test_encodings(told: str, raw: bytes, value: str, warned: bool) -> None:
    vmx = parse_vmx(b'.encoding = "%s"\ndisplayName = "%s"\n' % (told.encode(), raw), "it")
    assert vmx.get("displayName") == value
    assert bool(vmx.warnings) is warned


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no line of the form"),
        (b"hello\n", "no line of the form"),
        (b"# Disk DescriptorFile\nversion=1\n", "a VMDK descriptor"),
        (b"KDMV\1\0\0\0", "a VMDK disk image"),
        (b"COWD\1\0\0\0", "a VMDK disk image"),
        (b"<?xml version='1.0'?>", "an XML file"),
        (b'a = "b\0"\n', "is not text"),
        (b'a = "b"\n' * (MAX_SIZE // 4), "it can't be a VMX file"),
    ],
)
def test_what_is_no_vmx_file_says_what_it_is(content: bytes, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        parse_vmx(content, "it")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('memSize = "lots"', 'memSize = "lots"’ is not a whole number'),
        ('memSize = "0"', "can't have 0 MiB"),
        ('memSize = "99999999999"', "MiB of memory"),
        ('numvcpus = "-1"', "can't have -1 processors"),
        ('numvcpus = "100000"', "can't have 100000 processors"),
        ('cpuid.coresPerSocket = "x"', "is not a whole number"),
        ('vm.genid = "99999999999999999999"\nvm.genidX = "1"', "not numbers of 64 bits"),
        ('scsi0:1.fileName = ""', "scsi0:1.fileName can't be the name of a file"),
        ('scsi0:1.fileName = "a|00b.vmdk"', "can't be the name of a file"),
        ('encryption.keySafe = "vmware:key/list"', "the guest is encrypted"),
    ],
)
def test_a_guest_that_makes_no_sense(line: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        source_of(line)


def test_a_guest_without_disks() -> None:
    with pytest.raises(SourceError, match="names no disk"):
        guest_of('displayName = "x"\nide0:0.deviceType = "cdrom-image"\nide0:0.fileName = "a"\n')


def test_defaults() -> None:
    found = guest_of(DISK)
    assert found.guest == SourceGuest(
        name="file", hypervisor="vmware", memory=32 << 20, vcpus=1, firmware="bios", disks=[]
    )
    assert found.warnings == ["the file has no displayName; the guest is named after the file"]


def test_a_genid_is_a_guid_of_windows() -> None:
    # As virt-v2v 2.2 prints these two.
    source = source_of('vm.genid = "-123456789012345"\nvm.genidX = "987654321098765"\n')
    assert source.genid == "79f22087-8fb7-ffff-0d50-f83044820300"
    assert source_of('vm.genid = "1"\n').genid is None


@pytest.mark.parametrize(
    ("vcpus", "cores", "topology"),
    [
        (4, 2, CpuTopology(sockets=2, cores=2, threads=1)),
        (4, 3, CpuTopology(sockets=1, cores=3, threads=1)),
        (4, 8, None),
        (4, 0, None),
    ],
)
def test_topology(vcpus: int, cores: int, topology: CpuTopology | None) -> None:
    text = f'{DISK}numvcpus = "{vcpus}"\ncpuid.coresPerSocket = "{cores}"\n'
    found = guest_of(text)
    assert found.guest.cpu_topology == topology
    assert any("make no sense" in warning for warning in found.warnings) is (topology is None)


def test_firmware_secure_boot_and_tpm() -> None:
    source = source_of('firmware = "efi"\nuefi.secureBoot.enabled = "TRUE"\nvtpm.present = "TRUE"')
    assert (source.firmware, source.secure_boot) == ("uefi", True)
    assert source.tpm == SourceTpm(model="tpm-crb", version="2.0")
    assert source_of('firmware = "bios"\n').firmware == "bios"
    assert source_of('vtpm.present = "FALSE"\n').tpm is None


def test_disks_of_every_bus_in_virt_v2vs_order() -> None:
    found = guest_of(
        "".join(
            f'{where}.fileName = "{where.replace(":", "-")}.vmdk"\n'
            for where in (
                "ide1:0",
                "ide0:1",
                "sata0:2",
                "nvme0:0",
                "scsi1:0",
                "scsi0:10",
                "scsi0:2",
            )
        )
    )
    assert [disk.key for disk in found.disks] == [
        *("scsi0:2", "scsi0:10", "scsi1:0", "nvme0:0", "sata0:2", "ide0:1", "ide1:0")
    ]
    assert found.disks[0].controller == "scsi"
    assert found.disks[3].controller == "nvme"


def test_device_types() -> None:
    found = guest_of(
        DISK + 'scsi0:0.deviceType = "scsi-hardDisk"\n'
        'ide0:0.fileName = "b.vmdk"\nide0:0.deviceType = "ATA-hardDisk"\n'
        'ide0:1.fileName = "c.vmdk"\n'
        'scsi0:1.fileName = "x"\nscsi0:1.deviceType = "scsi-passthru"\n'
        'scsi0:2.fileName = "y.iso"\nscsi0:2.deviceType = "cdrom-image"\n'
        'scsi0:3.fileName = "z.vmdk"\nscsi0:3.present = "FALSE"\n'
    )
    assert [disk.key for disk in found.disks] == ["scsi0:0", "ide0:0", "ide0:1"]
    assert any("scsi0:1 (‘scsi-passthru’) is not a disk" in text for text in found.warnings)


def test_removable_media_have_slots() -> None:
    source = source_of(
        'ide1:0.deviceType = "cdrom-image"\nide0:1.deviceType = "ATAPI-cdrom"\n'
        'sata1:3.deviceType = "cdrom-raw"\nscsi1:2.deviceType = "cdrom-image"\n'
        'floppy0.fileName = "f"\nfloppy1.present = "FALSE"\n'
    )
    assert source.removables == [
        SourceRemovable(type="cdrom", controller="ide", slot=1),
        SourceRemovable(type="cdrom", controller="ide", slot=2),
        SourceRemovable(type="cdrom", controller="sata", slot=33),
        SourceRemovable(type="cdrom", controller="scsi", slot=18),
        SourceRemovable(type="floppy", controller="floppy", slot=0),
    ]


def test_nics() -> None:
    found = guest_of(
        DISK + 'ethernet10.networkName = "last"\n'
        'ethernet0.virtualDev = "VmxNet3"\nethernet0.networkName = "VM Network"\n'
        'ethernet0.generatedAddress = "00:0C:29:00:00:01"\n'
        'ethernet1.addressType = "static"\nethernet1.address = "00:50:56:00:00:02"\n'
        'ethernet1.generatedAddress = "00:0c:29:00:00:03"\nethernet1.connectionType = "Bridged"\n'
        'ethernet2.address = "00:50:56:00:00:04"\nethernet2.connectionType = "nat"\n'
        'ethernet3.generatedAddress = "nonsense"\n'
        'ethernet4.present = "FALSE"\nethernet4.networkName = "x"\n'
    )
    assert found.guest.nics == [
        Nic(mac="00:0C:29:00:00:01", model="vmxnet3", vnet="VM Network"),
        Nic(mac="00:50:56:00:00:02", vnet="ethernet1", vnet_type="bridge"),
        Nic(mac="00:50:56:00:00:04", vnet="ethernet2"),
        Nic(vnet="ethernet3"),
        Nic(vnet="last"),
    ]
    assert any("‘nonsense’ (ethernet3) is not a MAC" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("told", "sound"), [("sb16", "sb16"), ("es1371", "es1370"), ("hdaudio", "ich6"), ("x", None)]
)
def test_sound(told: str, sound: str | None) -> None:
    assert source_of(f'sound.virtualDev = "{told}"\n').sound == sound


def test_a_name_has_no_control_characters() -> None:
    assert source_of('displayName = "a|0Ab|1B[2J"\n').name == "a?b?[2J"


KEYS = st.sampled_from(
    [
        "displayName",
        "memSize",
        "numvcpus",
        "cpuid.coresPerSocket",
        "vm.genid",
        "vm.genidX",
        "firmware",
        ".encoding",
        "scsi0:0.fileName",
        "scsi0:0.deviceType",
        "scsi0:0.present",
        "scsi999:999.fileName",
        "ide0:0.fileName",
        "sata0:0.deviceType",
        "nvme0:0.fileName",
        "ethernet0.present",
        "ethernet0.address",
        "ethernet0.addressType",
        "ethernet0.generatedAddress",
        "ethernet999.networkName",
        "floppy0.fileName",
        "sound.virtualDev",
        "uefi.secureBoot.enabled",
        "vtpm.present",
        "encryption.data",
        ".",
        "..",
        "a..b",
        "present",
    ]
)
VALUES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"TRUE", b"FALSE", b"-1", b"0", b"4", b"9" * 20, b"|00", b"|80", b"disk"]),
    st.sampled_from(
        [b"utf-7", b"utf-16", b"idna", b"hex", b"punycode", b"unicode_escape", b"cp037"]
    ),
)
LINES = st.lists(
    st.one_of(
        st.builds(lambda key, value: b'%s = "%s"' % (key.encode(), value), KEYS, VALUES),
        st.binary(max_size=60),
    ),
    max_size=20,
).map(b"\n".join)


@given(st.one_of(LINES, st.binary(max_size=400)))
@example(b'.encoding = "undefined"\nscsi0:0.fileName = "a"')
@example(b'.encoding = "rot13"\nscsi0:0.fileName = "a"')
@example(b'.encoding = "unicode_escape"\nscsi0:0.fileName = "a"\ndisplayName = "\\ud800"')
@example(b'scsi0:0.fileName = "a"\ndisplayName = "|ED|A0|80"')
def test_any_file_is_a_guest_or_a_source_error(content: bytes) -> None:
    try:
        found = read_guest(parse_vmx(content, "it"), "file")
    except SourceError:
        return
    assert found.disks
    # What is written to metadata.in must be writable.
    SourceGuest.model_validate_json(found.guest.model_dump_json())
