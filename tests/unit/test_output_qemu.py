"""The script of -o qemu, run by a real shell with a qemu that only notes how it was called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.unit.test_output_domain_xml import source, target
from v2v_async.errors import DependencyError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.model import (
    CpuTopology,
    Guestcaps,
    Nic,
    SourceRemovable,
    SourceTpm,
    TargetBuses,
    TargetGuest,
)
from v2v_async.options import OutputOptions
from v2v_async.output.domain_xml import TargetDisk
from v2v_async.output.qemu import QemuOutput
from v2v_async.output.qemu_script import qemu_script
from v2v_async.output.uefi import UefiFirmware, find_uefi

HOSTILE = (
    'o\'neill "quoted" `id` $(touch pwned) ${HOME} \\ * ? ~ ; & | > <',
    "a,b=c,,d",
    "two\nlines\n$(touch pwned)\n#",
    "-dash",
    "../../escape",
    "x" * 300,
    "😀 café",
)

# Answers as qemu would when it is tried, else notes its arguments.
FAKE = """\
#!/bin/sh
case "$*" in
    *"-display help"*) printf 'none\\ngtk\\n'; exit ;;
    *"-accel kvm -cpu host"*-append*) echo "$TRIAL"; exit ;;
    *"-accel kvm"*"-monitor stdio"*) test "$TRIAL" = 'not syncing: VFS'; exit ;;
esac
printf '%s\\0' "$@" >"$NOTED"
"""


class Run:
    """Runs scripts in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = folder / "fake-qemu"
        self.fake.write_text(FAKE)
        self.fake.chmod(0o755)

    def __call__(self, script: bytes, *arguments: str, **environment: str) -> list[str]:
        """Return what qemu was given. Fails where the script does."""
        path, noted = self.folder / "script.sh", self.folder / "noted"
        path.write_bytes(script)
        path.chmod(0o755)
        noted.unlink(missing_ok=True)
        mine = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        done = subprocess.run(
            [str(path), *arguments],
            env={
                **mine,
                "QEMU": str(self.fake),
                "QEMU_ACCEL": "tcg",
                "NOTED": str(noted),
                "TRIAL": "",
                **environment,
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not (self.folder / "pwned").exists()
        return noted.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def script_for(guest: TargetGuest, uefi: UefiFirmware | None = None, folder: str = "/out") -> bytes:
    disks = {d.index: TargetDisk(f"{folder}/d{d.index}", "qcow2") for d in guest.source.disks}
    return qemu_script(guest, disks, uefi, Path(folder) / "web.vars")


def values(argv: list[str], option: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == option]


def devices(argv: list[str], prefix: str = "") -> list[str]:
    return [value for value in values(argv, "-device") if value.startswith(prefix)]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_means_anything_to_the_shell_or_to_qemu(run: Run, name: str) -> None:
    disks = {1: TargetDisk(f"/out/{name}-sda", "raw"), 2: TargetDisk(f"/o,/{name}", "qcow2")}
    guest = target(name=name, nics=[Nic(mac="52:54:00:0a:0b:0c,netdev=x")])
    argv = run(qemu_script(guest, disks, None, Path(f"/out/{name}")))
    doubled = name.replace(",", ",,")
    assert values(argv, "-name") == [f"guest={doubled}"]
    assert values(argv, "-drive") == [
        f"if=none,id=disk1,format=raw,file=/out/{doubled}-sda",
        f"if=none,id=disk2,format=qcow2,file=/o,,/{doubled}",
    ]
    assert devices(argv, "virtio-net") == [
        "virtio-net-pci,netdev=net0,mac=52:54:00:0a:0b:0c,,netdev=x"
    ]


def test_hardware_is_the_guests(run: Run) -> None:
    caps = Guestcaps(
        virtio_rng=True, virtio_balloon=True, isa_pvpanic=True, rtc_utc=False, acpi=False
    )
    topology = CpuTopology(sockets=2, cores=3, threads=2)
    hardware = source(
        memory=(1 << 30) + 1536,
        vcpus=12,
        cpu_topology=topology,
        genid="3EB5B6E6-DBE1-4E4E-9BB3-3C6A9C1E3A11",
        sound="ac97",
    )
    argv = run(script_for(target(source=hardware, guestcaps=caps)))
    assert values(argv, "-machine") == ["q35,acpi=off"]
    assert values(argv, "-m") == ["1048578k"]  # 1.5 KiB, rounded up
    assert values(argv, "-smp") == ["cpus=12,sockets=2,cores=3,threads=2"]
    assert values(argv, "-rtc") == ["base=localtime"]
    assert values(argv, "-accel") == ["tcg"]
    assert values(argv, "-cpu") == ["max,la57=off"]
    assert values(argv, "-audiodev") == ["none,id=sound0"]
    assert {
        "vmgenid,guid=3eb5b6e6-dbe1-4e4e-9bb3-3c6a9c1e3a11,id=vmgenid0",
        "virtio-rng-pci,rng=rng0",
        "virtio-balloon-pci",
        "pvpanic,ioport=0x505",
        "AC97,audiodev=sound0",
    } <= set(devices(argv))
    assert "-netdev" not in argv
    plain = run(script_for(target(source=source(genid="rubbish"))))
    assert devices(plain) == [
        "virtio-blk-pci,drive=disk1,bootindex=1",
        "virtio-blk-pci,drive=disk2",
        "usb-tablet",
    ]
    # A topology that contradicts the number of processors is not for qemu, which would refuse it.
    odd = run(script_for(target(source=source(vcpus=5, cpu_topology=topology))))
    assert values(odd, "-smp") == ["cpus=5"]


@pytest.mark.parametrize(
    ("machine", "buses", "expected"),
    [
        (
            "q35",
            TargetBuses(virtio_scsi=[2, None, 1]),
            [
                "virtio-scsi-pci,id=scsi0",
                "scsi-hd,drive=disk2,bus=scsi0.0,scsi-id=0",
                "scsi-hd,drive=disk1,bus=scsi0.0,scsi-id=2,bootindex=1",
            ],
        ),
        (
            "i440fx",
            TargetBuses(
                ide=[1, None, None, 2],
                removables=[SourceRemovable(type="cdrom", controller="ide", slot=1)],
            ),
            [
                "ide-hd,drive=disk1,bus=ide.0,unit=0,bootindex=1",
                "ide-cd,bus=ide.0,unit=1",
                "ide-hd,drive=disk2,bus=ide.1,unit=1",
            ],
        ),
        (
            "i440fx",
            TargetBuses(sata=[1], ide=[2]),
            [
                "ide-hd,drive=disk2,bus=ide.0,unit=0",
                "ich9-ahci,id=ahci0",
                "ide-hd,drive=disk1,bus=ahci0.0,bootindex=1",
            ],
        ),
        (
            "q35",
            TargetBuses(
                sata=[None] * 6 + [1, 2],
                removables=[
                    SourceRemovable(type="cdrom", controller="sata", slot=5),
                    SourceRemovable(type="floppy", controller="floppy", slot=1),
                ],
            ),
            [
                "ide-cd,bus=ide.5",
                "ich9-ahci,id=ahci0",
                "ide-hd,drive=disk1,bus=ahci0.0,bootindex=1",
                "ide-hd,drive=disk2,bus=ahci0.1",
                "isa-fdc,id=fdc0",
                "floppy,unit=1",
            ],
        ),
    ],
    ids=["virtio-scsi", "ide", "sata-and-ide", "many-sata"],
)
def test_disks_and_drives_on_their_buses_in_order(
    run: Run, machine: Any, buses: TargetBuses, expected: list[str]
) -> None:
    argv = run(script_for(target(buses=buses, guestcaps=Guestcaps(machine=machine))))
    assert [d for d in devices(argv) if d != "usb-tablet"] == expected


@pytest.mark.parametrize(
    ("machine", "is_modern", "device"),
    [
        ("q35", True, "virtio-blk-pci"),
        ("q35", False, "virtio-blk-pci-transitional"),
        ("i440fx", False, "virtio-blk-pci"),
    ],
)
def test_old_drivers_get_devices_that_they_know(
    run: Run, machine: Any, is_modern: bool, device: str
) -> None:
    guest = target(guestcaps=Guestcaps(machine=machine, virtio_1_0=is_modern))
    assert devices(run(script_for(guest)), f"{device},drive=disk2")


def firmware(folder: Path, *, is_secure: bool = False) -> UefiFirmware:
    for name in ("CODE.fd", "VARS.fd"):
        (folder / name).write_text(f"the {name}")
    (folder / "VARS.fd").chmod(0o444)
    return UefiFirmware(str(folder / "CODE.fd"), str(folder / "VARS.fd"), is_secure)


def test_uefi_variables_are_copied_once_and_are_the_guests(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "o,u 't"
    folder.mkdir()
    script = script_for(target(firmware="uefi"), firmware(tmp_path), str(folder))
    argv = run(script)
    doubled = str(folder).replace(",", ",,")
    assert values(argv, "-drive")[:2] == [
        f"if=pflash,unit=0,format=raw,readonly=on,file={tmp_path}/CODE.fd",
        f"if=pflash,unit=1,format=raw,readonly=off,file={doubled}/web.vars",
    ]
    assert values(argv, "-machine") == ["q35"]
    variables = folder / "web.vars"
    assert os.access(variables, os.W_OK)
    assert variables.stat().st_mode & 0o200
    variables.write_text("written by the guest")
    run(script)
    assert variables.read_text() == "written by the guest"
    assert [path.name for path in folder.iterdir()] == ["web.vars"]


def test_secure_boot_wants_smm_and_q35(run: Run, tmp_path: Path) -> None:
    caps = Guestcaps(machine="i440fx")
    guest = target(firmware="uefi", secure_boot=True, guestcaps=caps)
    argv = run(script_for(guest, firmware(tmp_path, is_secure=True), str(tmp_path)))
    assert values(argv, "-machine") == ["q35,smm=on"]
    assert values(argv, "-global") == ["driver=cfi.pflash01,property=secure,value=on"]


def test_where_there_was_no_uefi_firmware_the_script_asks_for_it(run: Run, tmp_path: Path) -> None:
    script = script_for(target(firmware="uefi"), None, str(tmp_path))
    with pytest.raises(AssertionError, match="QEMU_UEFI_CODE: set it to"):
        run(script)
    found = firmware(tmp_path)
    argv = run(script, QEMU_UEFI_CODE=found.code, QEMU_UEFI_VARS=found.variables)
    assert values(argv, "-drive")[0].endswith(f"file={found.code}")


def test_kvm_is_used_where_a_trial_says_that_it_works(run: Run) -> None:
    script = script_for(target())
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    works = run(script, QEMU_ACCEL="", TRIAL="not syncing: VFS")
    assert values(works, "-accel") == ["kvm" if usable else "tcg"]
    assert values(works, "-cpu") == ["host" if usable else "max,la57=off"]
    broken = run(script, QEMU_ACCEL="", TRIAL="")
    assert values(broken, "-accel") == ["tcg"]
    assert values(run(script, QEMU_ACCEL="kvm"), "-cpu") == ["host"]


@pytest.mark.parametrize(
    ("shown", "environment", "expected"),
    [
        ("window", {}, ["none"]),
        ("window", {"DISPLAY": ":0"}, ["gtk"]),
        ("window", {"WAYLAND_DISPLAY": "wayland-0", "QEMU_DISPLAY": "none"}, ["none"]),
        (None, {"DISPLAY": ":0"}, ["gtk"]),
        ("vnc en-us", {"DISPLAY": ":0"}, ["vnc=127.0.0.1:0,to=99"]),
        ("spice", {}, ["none"]),
    ],
)
def test_the_display(
    run: Run, shown: str | None, environment: dict[str, str], expected: list[str]
) -> None:
    argv = run(script_for(target(source=source(display=shown))), **environment)
    assert values(argv, "-display") == expected
    listens = values(argv, "-spice")
    assert listens == (
        ["port=5900,addr=127.0.0.1,disable-ticketing=on"] if shown == "spice" else []
    )


def test_other_architectures_have_no_hardware_of_a_pc(run: Run) -> None:
    caps = Guestcaps(arch="aarch64", machine="virt", isa_pvpanic=True, virtio_rng=True)
    removables = [SourceRemovable(type="floppy", controller="floppy", slot=0)]
    buses = TargetBuses(virtio_blk=[1], sata=[2], removables=removables)
    hardware = source(sound="ac97", genid="3eb5b6e6-dbe1-4e4e-9bb3-3c6a9c1e3a11")
    script = script_for(target(guestcaps=caps, buses=buses, source=hardware))
    assert b"qemu=${QEMU:-qemu-system-aarch64}\n" in script
    argv = run(script)
    assert values(argv, "-machine") == ["virt"]
    assert values(argv, "-cpu") == ["max"]
    assert "-vga" not in argv
    assert devices(argv) == [
        "virtio-blk-pci,drive=disk1,bootindex=1",
        "ich9-ahci,id=ahci0",
        "ide-hd,drive=disk2,bus=ahci0.0",
        "virtio-gpu-pci",
        "qemu-xhci",
        "usb-kbd",
        "usb-tablet",
        "virtio-rng-pci,rng=rng0",
    ]


def test_arguments_of_the_script_come_last(run: Run) -> None:
    assert run(script_for(target()), "-m", "1 G", "-snapshot")[-3:] == ["-m", "1 G", "-snapshot"]


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    require("shellcheck")
    caps = Guestcaps(virtio_socket=True, virtio_rng=True)
    path = tmp_path / "web.sh"
    path.write_bytes(script_for(target(firmware="uefi", guestcaps=caps), firmware(tmp_path)))
    done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("machine", "changes"),
    [
        ("q35", {}),
        ("i440fx", {}),
        ("q35", {"virtio_1_0": False}),
        ("q35", {"net_bus": "e1000"}),
        ("i440fx", {"net_bus": "rtl8139", "acpi": False}),
    ],
)
@pytest.mark.parametrize("sound", ["ac97", "es1370", "ich6", "ich9", "pcspk", "sb16", "usb"])
def test_qemu_takes_it(run: Run, tmp_path: Path, machine: Any, changes: Any, sound: str) -> None:
    """The real one: every device is made, no processor runs; Ctrl-A X ends it."""
    require("qemu-system-x86_64", "qemu-img")
    removables = [
        SourceRemovable(type="cdrom", controller="ide", slot=1),
        SourceRemovable(type="cdrom", controller="virtio-scsi", slot=3),
        SourceRemovable(type="floppy", controller="floppy", slot=0),
    ]
    guest = target(
        name=HOSTILE[0],
        guestcaps=Guestcaps(
            machine=machine, virtio_rng=True, virtio_balloon=True, isa_pvpanic=True, **changes
        ),
        buses=TargetBuses(
            ide=[1], sata=[2], virtio_scsi=[3], virtio_blk=[4], removables=removables
        ),
        source=source(
            memory=64 << 20,
            sound=sound,
            genid="3eb5b6e6-dbe1-4e4e-9bb3-3c6a9c1e3a11",
            disks=[source().disks[0].model_copy(update={"index": i}) for i in range(1, 5)],
        ),
        nics=[Nic(mac="52:54:00:11:22:33"), Nic()],
    )
    for disk in guest.source.disks:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / f"d{disk.index}"), "1M"]
        subprocess.run(create, check=True)
    path = tmp_path / "web.sh"
    path.write_bytes(script_for(guest, folder=str(tmp_path)))
    done = subprocess.run(
        ["sh", str(path), "-S"],
        env={**os.environ, "QEMU_ACCEL": "tcg", "QEMU_DISPLAY": "none"},
        input=b"\x01x",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_qemu_takes_secure_boot(tmp_path: Path) -> None:
    require("qemu-system-x86_64", "qemu-img")
    uefi = find_uefi("x86_64", secure=True)
    if uefi is None:
        pytest.skip("no OVMF with secure boot is installed")
    guest = target(firmware="uefi", secure_boot=True, source=source(memory=64 << 20))
    for number in (1, 2):
        create = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / f"d{number}"), "1M"]
        subprocess.run(create, check=True)
    path = tmp_path / "web.sh"
    path.write_bytes(script_for(guest, uefi, str(tmp_path)))
    done = subprocess.run(
        ["sh", str(path), "-S"],
        env={**os.environ, "QEMU_ACCEL": "tcg", "QEMU_DISPLAY": "none"},
        input=b"\x01x",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "web.vars").stat().st_size == Path(uefi.variables).stat().st_size


def parse(**fields: Any) -> QemuOutput:
    return QemuOutput.parse(OutputOptions(**{"mode": "qemu", "storage": "/out", **fields}))


def test_qemu_boot_is_a_choice() -> None:
    assert not parse().is_booted
    assert parse(options=(("qemu-boot", None),)).is_booted
    assert not parse(options=(("qemu-boot", "false"),)).is_booted
    with pytest.raises(UsageError, match="true or false"):
        parse(options=(("qemu-boot", "later"),))
    with pytest.raises(UsageError, match="no option ‘-oo boot’") as caught:
        parse(options=(("boot", None),))
    assert "-oo qemu-boot" in (caught.value.hint or "")


@pytest.mark.anyio
async def test_what_is_needed_to_boot_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    reporter = Reporter(events.append, "t")
    await parse(storage=str(tmp_path), options=(("qemu-boot", None),)).check(reporter)
    monkeypatch.setattr(
        "v2v_async.output.qemu.shutil.which",
        lambda name: None if name.startswith("qemu-system") else f"/usr/bin/{name}",
    )
    with pytest.raises(DependencyError, match="qemu-system-x86_64 is not installed"):
        await parse(storage=str(tmp_path), options=(("qemu-boot", None),)).check(reporter)
    tpm = source(tpm=SourceTpm(model="tpm-crb"))
    await parse(storage=str(tmp_path)).check_source(tpm, "web", reporter)
    assert [event.type for event in events] == ["warning"]
    assert "TPM" in (events[0].text or "")
