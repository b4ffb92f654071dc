"""What -o glance and -o openstack tell OpenStack of a guest, and the options they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from v2v_async.errors import UsageError
from v2v_async.model import (
    CpuTopology,
    Guestcaps,
    Inspection,
    SourceDisk,
    SourceGuest,
    SourceTpm,
    TargetBuses,
    TargetGuest,
)
from v2v_async.openstack_answers import hint_for, reason
from v2v_async.openstack_cloud import Login
from v2v_async.options import OutputOptions
from v2v_async.output.openstack.cinder import OpenstackOutput, volume_names
from v2v_async.output.openstack.glance import GlanceOutput, image_names
from v2v_async.output.openstack.login_options import LOGIN_HELP, SECRETS
from v2v_async.output.openstack.properties import image_properties, remarks
from v2v_async.output.openstack.volumes import device_of, size_in_gib
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret

RECORDED = Path(__file__).parents[1] / "recorded" / "openstack" / "virt-v2v-2.2-glance.json"


def target(source: dict[str, Any] | None = None, **changes: Any) -> TargetGuest:
    """The guest that virt-v2v was recorded with."""
    fields: dict[str, Any] = {
        "name": "rec",
        "source": SourceGuest(
            **{
                "name": "phony",
                "memory": 2 << 30,
                "vcpus": 2,
                "disks": [SourceDisk(index=1, source="/a", format="raw", size=1 << 27)],
                **(source or {}),
            }
        ),
        "guestcaps": Guestcaps(virtio_rng=True),
        "inspection": Inspection(type="linux", distro="debian", major_version=12),
        "firmware": "bios",
        "buses": TargetBuses(virtio_blk=[1]),
    }
    return TargetGuest(**{**fields, **changes})


def test_the_properties_are_virt_v2vs() -> None:
    for image in json.loads(RECORDED.read_text()):
        recorded = {name: str(value) for name, value in image["properties"].items()}
        assert image_properties(target()) == recorded


def test_the_names_are_virt_v2vs() -> None:
    names = [image["name"] for image in json.loads(RECORDED.read_text())]
    assert image_names("rec", 3) == names
    assert volume_names("rec", 2) == ["rec-sda", "rec-sdb"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"firmware": "uefi"}, {"hw_firmware_type": "uefi"}),
        (
            {"firmware": "uefi", "secure_boot": True},
            {"hw_firmware_type": "uefi", "os_secure_boot": "optional"},
        ),
        ({"secure_boot": True}, {}),
        (
            {"guestcaps": Guestcaps(block_bus="virtio-scsi", net_bus="e1000", machine="i440fx")},
            {
                "hw_disk_bus": "scsi",
                "hw_scsi_model": "virtio-scsi",
                "hw_vif_model": "e1000",
                "hw_machine_type": "pc",
                "hw_rng_model": None,
            },
        ),
        (
            {"guestcaps": Guestcaps(block_bus="ide", video="cirrus", virtio_rng=True)},
            {"hw_disk_bus": "ide", "hw_video_model": "cirrus"},
        ),
        (
            {"guestcaps": Guestcaps(arch="aarch64", machine="virt", virtio_rng=True)},
            {"architecture": "aarch64", "hw_machine_type": "virt"},
        ),
        (
            {"inspection": Inspection(type="windows", distro="windows", major_version=6,
                                      minor_version=3)},
            {"os_type": "windows", "os_distro": "windows", "os_version": "6.3"},
        ),
        (
            {"inspection": Inspection(type="linux", distro="archlinux")},
            {"os_distro": "arch", "os_version": None},
        ),
        (
            {"source": {"cpu_topology": CpuTopology(sockets=2, cores=3, threads=1)}},
            {"hw_cpu_sockets": "2", "hw_cpu_cores": "3", "hw_cpu_threads": "1"},
        ),
    ],
    ids=["uefi", "secure boot", "bios", "scsi", "ide", "arm", "windows", "arch", "topology"],
)  # fmt: skip
def test_what_differs(changes: dict[str, Any], expected: dict[str, str | None]) -> None:
    """From the properties of the recorded guest, and nothing else does."""
    wanted: dict[str, str | None] = {**image_properties(target()), **expected}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    assert image_properties(target(**changes)) == wanted


def test_a_tpm_is_told_of() -> None:
    guest = target(source={"tpm": SourceTpm(model="tpm-crb", version="2.0")})
    [told] = remarks(guest, "openstack image set --property PROPERTY 1")
    assert "openstack image set --property hw_tpm_version=2.0 1" in told
    assert remarks(target(), "x") == []


def test_every_login_option_goes_where_it_belongs() -> None:
    options = tuple((name, f"value of {name}") for name in LOGIN_HELP if name.startswith("os-"))
    output = parse_output(OutputOptions(mode="glance", options=options))
    assert isinstance(output, GlanceOutput)
    assert set(output.login.secrets) == SECRETS
    assert output.login.settings == {n: v for n, v in options if n not in SECRETS}
    for secret in SECRETS:
        assert f"value of {secret}" not in output.login.command("x") + repr(output.login)


def test_the_password_of_a_file() -> None:
    output = parse_output(
        OutputOptions(mode="glance", connection="https://c/v3", password=Secret("pa55"))
    )
    assert isinstance(output, GlanceOutput)
    assert output.login.secrets["os-password"].reveal() == "pa55"
    assert output.login.command("x") == "openstack --os-auth-url=https://c/v3 x"


SERVER = ("server-id", "me")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "glance", "storage": "x"}, "takes no -os"),
        ({"mode": "glance", "format": "vmdk"}, "-of vmdk"),
        ({"mode": "glance", "options": (SERVER,)}, "no option ‘-oo server-id’"),
        ({"mode": "glance", "options": (("os-nonsense", "1"),)}, "no option ‘-oo os-nonsense’"),
        ({"mode": "glance", "options": (("os-username", None),)}, "needs a value"),
        ({"mode": "glance", "options": (("os-password", "x"),), "password": Secret("y")}, "-op"),
        ({"mode": "glance", "options": (("os-auth-url", "x"),), "connection": "y"}, "-oc"),
        ({"mode": "glance", "options": (("verify-server-certificate", "maybe"),)}, "true or false"),
        ({"mode": "glance", "name": "a\nb"}, "control character"),
        ({"mode": "glance", "connection": ""}, "-oc is empty"),
        ({}, "server-id=NAME"),
        ({"options": (("server-id", ""),)}, "needs a value"),
        ({"options": (SERVER,), "format": "qcow2"}, "-of qcow2"),
        ({"options": (SERVER,), "allocation": "preallocated"}, "-oa preallocated"),
        ({"options": (SERVER,), "storage": ""}, "-os is empty"),
        ({"options": (SERVER,), "name": "x" * 252}, "more than 255"),
        ({"options": (SERVER, ("guest-id", "x" * 256))}, "more than 255"),
        ({"options": (SERVER, ("compressed", None))}, "no option ‘-oo compressed’"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_output(OutputOptions(**{"mode": "openstack", **fields}))
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_what_virt_v2v_takes() -> None:
    options = (SERVER, ("guest-id", "7"), ("dev-disk-by-id", "/x"), ("os-username", "u"))
    output = parse_output(
        OutputOptions(mode="openstack", format="raw", storage="fast", options=options)
    )
    assert isinstance(output, OpenstackOutput)
    assert (output.place.server, output.place.type) == ("me", "fast")
    assert (output.place.guest_id, output.place.devices) == ("7", Path("/x"))


def test_commands_for_people_survive_a_shell() -> None:
    login = Login({"os-username": "a'b $(c)"}, {"os-password": Secret("x")}, is_verified=False)
    words = login.command("image", "delete", "1")
    assert words == "openstack '--os-username=a'\"'\"'b $(c)' --insecure image delete 1"


@pytest.mark.parametrize(("size", "gib"), [(0, 1), (1, 1), (1 << 30, 1), ((1 << 30) + 1, 2)])
def test_volumes_are_whole_gibibytes(size: int, gib: int) -> None:
    assert size_in_gib(size) == gib


def test_the_device_of_a_volume(tmp_path: Path) -> None:
    volume = "c4d06d15-22ef-462e-9eff-ab54ab285a1f"
    assert device_of(volume, tmp_path / "absent") is None
    for name in (f"virtio-{volume[:19]}x", "virtio-c4d06d15-22ef-462f-9"):
        (tmp_path / name).touch()
    assert device_of(volume, tmp_path) is None
    (tmp_path / f"virtio-{volume[:20]}-part1").touch()
    (tmp_path / f"a-{volume[:20]}").symlink_to("nowhere")
    assert device_of(volume, tmp_path) is None
    for name in (f"virtio-{volume[:20]}", f"scsi-0QEMU_QEMU_HARDDISK_{volume}"):
        (tmp_path / name).touch()
        assert device_of(volume, tmp_path) == tmp_path / name


class Answer:
    """What requests gives."""

    def __init__(self, text: str) -> None:
        self.text = text

    def json(self) -> Any:
        return json.loads(self.text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"badRequest": {"code": 400, "message": "Invalid\\nvolume"}}', ": Invalid volume"),
        ('{"error": {"code": 401, "message": "No."}}', ": No."),
        ('{"message": "No."}', ": No."),
        ("<html><head><title>413 Big</title></head><body><h1>413 Big</h1>Too &lt;big&gt;.<br />"
         "</body></html>", ": Too <big>."),
        ("", ""),
        ("[]", ""),
        ("{}", ""),
        ("null", ""),
        ('{"x": 7}', ""),
    ],
)  # fmt: skip
def test_the_reason_of_a_refusal(text: str, expected: str) -> None:
    assert reason(Answer(text)) == expected


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500])
def test_every_refusal_has_a_hint(status: int) -> None:
    assert hint_for("Cinder", status, None)
    assert hint_for("Cinder", 500, "req-1").endswith("req-1")
