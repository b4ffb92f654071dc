"""What ``inspect`` makes of what guestfs tells, and of its command line."""

from __future__ import annotations

from typing import Any

import pytest

from v2v_async.appliance_inspect import ESP_TYPE, choose, has_esp, look, unlock
from v2v_async.cli import virt_v2v
from v2v_async.cli.inspect import _OURS, inspect_options
from v2v_async.errors import UsageError
from v2v_async.inspection import _no_system, guest_of, to_xml
from v2v_async.model import InspectedDisk, SourceGuest
from v2v_async.options import InspectOptions

SOURCE = SourceGuest(name="web", memory=1 << 30, vcpus=1, disks=[])
FACTS = {
    "type": "linux", "distro": "debian", "osinfo": "debian12", "arch": "x86_64",
    "major_version": 12, "minor_version": 1, "product_name": "Debian GNU/Linux",
    "product_variant": "unknown", "package_format": "deb", "package_management": "apt",
    "hostname": "web1",
}  # fmt: skip


class Handle:
    """guestfs with a guest of two systems, one of them encrypted until it is opened."""

    def __init__(self, **types: str) -> None:
        self.types = types
        self.opened: list[tuple[str, str]] = []
        self.was_scanned = False

    def list_filesystems(self) -> dict[str, str]:
        return {"/dev/sda1": "ext4"}

    def vfs_type(self, device: str) -> str:
        types = {"/dev/sda1": "ext4", "/dev/sda2": "crypto_LUKS", "/dev/sdb": "BitLocker"}
        if device not in types:
            raise RuntimeError("nothing")
        return types[device]

    def list_partitions(self) -> list[str]:
        return ["/dev/sda1", "/dev/sda2"]

    def lvs(self) -> list[str]:
        return ["/dev/vg/lv"]

    def vfs_uuid(self, device: str) -> str:
        return {"/dev/sda2": "uuid-2", "/dev/sdb": "uuid-b"}[device]

    def cryptsetup_open(self, device: str, key: str, name: str) -> None:
        if key != "right":
            raise RuntimeError("no")
        self.opened.append((device, name))

    def clevis_luks_unlock(self, device: str, name: str) -> None:
        self.opened.append((device, name))

    def lvm_scan(self, activate: bool) -> None:
        self.was_scanned = activate

    def list_devices(self) -> list[str]:
        return ["/dev/sda", "/dev/sdb"]

    def part_get_parttype(self, device: str) -> str:
        if device not in self.types:
            raise RuntimeError("no table")
        return self.types[device].partition(" ")[0]

    def part_list(self, device: str) -> list[dict[str, int]]:
        return [{"part_num": 1}, {"part_num": 2}]

    def part_get_gpt_type(self, device: str, number: int) -> str:
        is_esp = number == 2 and self.types[device].endswith("esp")
        return ESP_TYPE if is_esp else "0FC63DAF-8483-4772-8E79-3D69D8477DE4"

    def inspect_os(self) -> list[str]:
        return ["/dev/sda1", "/dev/mapper/v2vinspect0"]

    def inspect_get_mountpoints(self, root: str) -> dict[str, str]:
        return {"/": root}

    def __getattr__(self, name: str) -> Any:
        return lambda root: FACTS[name.removeprefix("inspect_get_")]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({}, False),
        ({"/dev/sda": "msdos"}, False),
        ({"/dev/sda": "gpt"}, False),
        ({"/dev/sdb": "gpt esp"}, True),
        ({"/dev/sda": "msdos", "/dev/sdb": "gpt esp"}, True),
    ],
)
def test_an_efi_system_partition_is_uefi(types: dict[str, str], expected: bool) -> None:
    assert has_esp(Handle(**types)) is expected


@pytest.mark.parametrize(
    ("roots", "wanted", "expected"),
    [
        (["/dev/sda1"], "single", "/dev/sda1"),
        (["/dev/sda1", "/dev/sdb1"], "single", None),
        (["/dev/sda1", "/dev/sdb1"], "first", "/dev/sda1"),
        (["/dev/sda1", "/dev/sdb1"], "/dev/sdb1", "/dev/sdb1"),
        (["/dev/sda1"], "/dev/sdc1", None),
        ([], "single", None),
        ([], "first", None),
    ],
)
def test_which_root(roots: list[str], wanted: str, expected: str | None) -> None:
    assert choose(roots, wanted) == expected


@pytest.mark.parametrize(
    ("identifier", "kind", "content", "locked"),
    [
        ("all", "file", "right\n", []),
        ("all", "file", "right", []),
        ("all", "file", "wrong", ["/dev/sda2", "/dev/sdb"]),
        ("/dev/sda2", "file", "right", ["/dev/sdb"]),
        ("uuid-b", "file", "right", ["/dev/sda2"]),
        ("/dev/sda2", "clevis", "", ["/dev/sdb"]),
        ("elsewhere", "file", "right", ["/dev/sda2", "/dev/sdb"]),
    ],
)
def test_keys(tmp_path: Any, identifier: str, kind: str, content: str, locked: list[str]) -> None:
    key = tmp_path / "key"
    key.write_text(content)
    handle = Handle()
    assert unlock(handle, [[identifier, kind, str(key)]]) == locked
    assert sorted(device for device, _ in handle.opened) == sorted(
        {"/dev/sda2", "/dev/sdb"} - set(locked)
    )
    assert handle.was_scanned is bool(handle.opened)


def test_a_guest_as_json_and_as_xml() -> None:
    found = look(Handle(**{"/dev/sda": "gpt esp"}), {"keys": [], "root": "first"})
    guest = guest_of(SOURCE, [InspectedDisk(index=1, size=100, allocated=40)], found)
    assert guest.firmware == "uefi"
    assert guest.hostname == "web1"
    assert guest.locked == ["/dev/sda2", "/dev/sdb"]
    assert guest.mountpoints == {"/": "/dev/sda1"}
    assert (guest.inspection.osinfo, guest.inspection.major_version) == ("debian12", 12)
    assert '<firmware type="uefi"/>' in to_xml(guest)
    bios = SOURCE.model_copy(update={"firmware": "bios"})
    assert guest_of(bios, [], found).firmware == "bios", "the source knows better"


@pytest.mark.parametrize(
    ("roots", "locked", "root", "message", "hint"),
    [
        (["/dev/sda1", "/dev/sdb1"], [], "single", "several operating systems", "--root first"),
        (["/dev/sda1"], [], "/dev/sdx", "‘/dev/sdx’ is not the root", "it has /dev/sda1"),
        ([], ["/dev/sda2"], "single", "/dev/sda2 can't be opened", "--key ID:file:FILE"),
        ([], [], "single", "its disks hold /dev/sda1 ext4", "all disks"),
    ],
)
def test_no_system(roots: list[str], locked: list[str], root: str, message: str, hint: str) -> None:
    found = {"roots": roots, "locked": locked, "filesystems": {"/dev/sda1": "ext4"}}
    error = _no_system(found, root)
    assert message in error.message
    assert hint in (error.hint or "")


def options(*argv: str) -> InspectOptions:
    return inspect_options(virt_v2v.read(["-i", "disk", "x.img", *argv], _OURS))


def test_the_command_line() -> None:
    assert options().root == "single"
    made = options("--root", "first", "--key", "all:key:sesame")
    assert (made.root, made.keys) == ("first", ("all:key:sesame",))
    assert "sesame" not in repr(made)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["-o", "local"], "takes no -o"),
        (["--parallel", "2"], "takes no --parallel"),
        (["--network", "default"], "takes no -n"),
        (["--keys-from-stdin"], "takes no --keys-from-stdin"),
        (["--hostname", "web"], "takes no --hostname"),
        (["--root", "ask"], "inspect asks nothing"),
    ],
)
def test_what_it_does_not_take(argv: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        options(*argv)
