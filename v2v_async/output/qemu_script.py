"""The shell script that boots a target guest with qemu.

::

    QemuCommand  words of the command line ──┐
                 shell expansions, as they are├── script(): POSIX sh, one option a line
    what only the booting machine knows ─────┘   accelerator, display, firmware's variables, vsock

Values pass through two languages: qemu's options (a comma in a value is doubled) and the shell's
(``shlex.quote``). Nothing of the guest's is put anywhere else, comments included.
"""

from __future__ import annotations

import shlex
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from v2v_async import __version__
from v2v_async.model import Nic, SourceGuest, SourceRemovable, TargetGuest
from v2v_async.output.domain_xml import MACHINES, TargetDisk
from v2v_async.output.uefi import UefiFirmware

_NET_DEVICES = {"virtio-net": "virtio-net-pci", "e1000": "e1000", "rtl8139": "rtl8139"}
_PORTS_OF_AHCI = 6
_X86 = ("x86_64", "i386", "i486", "i586", "i686")

# A boot sector or the firmware runs even where a kernel would hang under KVM (nested virtual
# machines), so a kernel is what is tried where one can be read; about a second where KVM works.
_ACCELERATOR = """\
# KVM where it works: /dev/kvm may be there and of no use, so that is tried. QEMU_ACCEL saves that.
accel=${QEMU_ACCEL:-}
if [ -z "$accel" ]; then
    accel=tcg
    if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then
        kernel=
        for each in /boot/vmlinuz-*; do
            if [ -r "$each" ]; then kernel=$each; fi
        done
        if [ -n "$kernel" ] && [ -n "$trial_console" ]; then
            if timeout 15 "$qemu" -machine "$trial_machine" -accel kvm -cpu host -m 512 \\
                -no-user-config -nodefaults -display none -no-reboot -serial stdio \\
                -kernel "$kernel" -append "console=$trial_console panic=-1" \\
                </dev/null 2>/dev/null | grep -q 'not syncing: VFS'; then accel=kvm; fi
        elif echo quit | timeout 15 "$qemu" -machine "$trial_machine" -accel kvm -cpu host \\
            -no-user-config -nodefaults -display none -monitor stdio >/dev/null 2>&1; then
            accel=kvm
        fi
    fi
fi
case $accel in
    kvm) cpu=host ;;
    *) cpu=$emulated_cpu ;;
esac
"""

_DISPLAY = """\
# What is added here goes before the arguments of the script itself, which come last and so win.
if [ -n "${QEMU_DISPLAY:-}" ]; then
    set -- -display "$QEMU_DISPLAY" "$@"
else
    shown=$display
    if [ "$shown" = window ]; then
        shown=none
        if [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ]; then
            for each in sdl gtk; do
                if "$qemu" -display help 2>/dev/null | grep -qx "$each"; then shown=$each; fi
            done
        fi
    fi
    case $shown in
        spice) set -- -display none -spice port=5900,addr=127.0.0.1,disable-ticketing=on "$@" ;;
        *) set -- -display "$shown" "$@" ;;
    esac
fi
"""

_VSOCK = """\
if [ -w /dev/vhost-vsock ]; then
    set -- -device "%s,guest-cid=${QEMU_CID:-%d}" "$@"
fi
"""


@dataclass(frozen=True, slots=True)
class Expansion:
    """A word that the shell expands; only ever a constant of this module."""

    text: str


Word = str | Expansion


class QemuCommand:
    """Words of qemu's command line, an option with its value a line."""

    def __init__(self) -> None:
        self.rows: list[tuple[Word, ...]] = []

    def add(self, *words: Word) -> None:
        """Add an option, and its value if it has one, word for word."""
        self.rows.append(words)

    def option(self, option: str, first: str | None = None, **values: object) -> None:
        """Add ``option first,name=value…``; commas in values are doubled, _ in names is -."""
        parts = [] if first is None else [first]
        for name, value in values.items():
            parts.append(f"{name.rstrip('_').replace('_', '-')}={_commas(str(value))}")
        self.add(option, ",".join(parts))

    def shell(self) -> str:
        """Return the lines, continued by backslashes."""
        return " \\\n    ".join(" ".join(map(_quoted, row)) for row in self.rows)


def qemu_script(
    target: TargetGuest,
    disks: Mapping[int, TargetDisk],
    uefi: UefiFirmware | None,
    variables: Path,
) -> bytes:
    """Return the script. ``disks`` is by index; ``variables``: where it keeps UEFI's variables.

    Without ``uefi`` the script of a UEFI guest asks for ``QEMU_UEFI_CODE`` and
    ``QEMU_UEFI_VARS`` when it is run.
    """
    caps = target.guestcaps
    is_x86 = caps.arch in _X86
    is_secure = target.firmware == "uefi" and (
        target.secure_boot or (uefi is not None and uefi.is_secure)
    )
    machine = "q35" if is_secure else MACHINES[caps.machine]
    settings = {
        "trial_machine": machine,
        "trial_console": {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}.get(caps.arch, ""),
        # Emulating five levels of page tables costs time, and some kernels do not get on with it.
        "emulated_cpu": "max,la57=off" if caps.arch == "x86_64" else "max",
        "display": _display(target.source),
    }
    parts = [
        "#!/bin/sh\n",
        f"# Boots a guest with qemu. Written by v2v-async {__version__}.\n",
        "# Arguments are added to qemu's: -snapshot leaves the disks as they are.\n",
        "# QEMU, QEMU_ACCEL (kvm, tcg), QEMU_DISPLAY, QEMU_AUDIO and QEMU_CID choose otherwise.\n",
        "set -eu\n\n",
        f"qemu=${{QEMU:-{shlex.quote(_program(caps.arch))}}}\n",
        *(f"{name}={shlex.quote(value)}\n" for name, value in settings.items()),
        "\n",
        _ACCELERATOR,
        "\n",
        _DISPLAY,
    ]
    if caps.virtio_socket:
        device = f"vhost-vsock-pci{_transitional(target, machine)}"
        parts += ["\n", _VSOCK % (device, _context_id(target.name))]
    if target.firmware == "uefi":
        parts += ["\n", _variables_part(uefi, variables)]
    command = QemuCommand()
    _machine(command, target, machine, is_secure=is_secure, is_x86=is_x86)
    _disks(command, target, disks, machine)
    for number, nic in enumerate(target.nics):
        _nic(command, nic, number, target, machine)
    _screen_and_sound(command, target.source, is_x86=is_x86)
    _virtio_devices(command, target, machine, is_x86=is_x86)
    parts += ["\n", 'exec "$qemu" \\\n    ', command.shell(), ' \\\n    "$@"\n']
    return "".join(parts).encode(errors="surrogateescape")


def _machine(
    command: QemuCommand, target: TargetGuest, machine: str, *, is_secure: bool, is_x86: bool
) -> None:
    source, caps = target.source, target.guestcaps
    command.add("-no-user-config")
    command.add("-nodefaults")
    command.option("-name", guest=target.name)
    extra: dict[str, object] = {}
    if is_secure:
        extra["smm"] = "on"
    if is_x86 and caps.acpi is False:
        extra["acpi"] = "off"
    command.option("-machine", machine, **extra)
    command.add("-accel", Expansion('"$accel"'))
    command.add("-cpu", Expansion('"$cpu"'))
    # qemu counts in MiB unless it is told.
    command.add("-m", f"{-(-source.memory // 1024)}k")
    topology = source.cpu_topology
    if topology is None or topology.sockets * topology.cores * topology.threads != source.vcpus:
        command.option("-smp", cpus=source.vcpus)
    else:
        command.option(
            "-smp",
            cpus=source.vcpus,
            sockets=topology.sockets,
            cores=topology.cores,
            threads=topology.threads,
        )
    command.option("-rtc", base="utc" if caps.rtc_utc else "localtime")
    if target.firmware == "uefi":
        if is_secure:
            command.option("-global", driver="cfi.pflash01", property="secure", value="on")
        for unit, variable, is_readonly in ((0, "code", "on"), (1, "vars", "off")):
            drive = f"if=pflash,unit={unit},format=raw,readonly={is_readonly},file="
            command.add("-drive", Expansion(f'"{drive}${variable}_option"'))
    if source.genid is not None and is_x86:
        try:
            genid = uuid.UUID(source.genid)
        except ValueError:
            # qemu would not start for it; the guest does without.
            return
        command.option("-device", "vmgenid", guid=genid, id="vmgenid0")


def _variables_part(uefi: UefiFirmware | None, variables: Path) -> str:
    """Return the lines that make this guest's copy of the variables, on the first run."""
    if uefi is None:
        code = "${QEMU_UEFI_CODE:?set it to the code of UEFI firmware, as OVMF_CODE.fd}"
        template = "${QEMU_UEFI_VARS:?set it to the variables of that firmware, as OVMF_VARS.fd}"
    else:
        code = f"${{QEMU_UEFI_CODE:-{_in_braces(uefi.code)}}}"
        template = f"${{QEMU_UEFI_VARS:-{_in_braces(uefi.variables)}}}"
    return (
        "# UEFI keeps its variables in a file; the guest has one of its own.\n"
        f'code="{code}"\n'
        f"vars={shlex.quote(str(variables))}\n"
        'if [ ! -e "$vars" ]; then\n'
        f'    cp -- "{template}" "$vars.$$"\n'
        '    chmod u+w -- "$vars.$$"\n'
        '    mv -- "$vars.$$" "$vars"\n'
        "fi\n"
        "code_option=$(printf '%s' \"$code\" | sed 's/,/,,/g')\n"
        "vars_option=$(printf '%s' \"$vars\" | sed 's/,/,,/g')\n"
    )


def _disks(
    command: QemuCommand, target: TargetGuest, disks: Mapping[int, TargetDisk], machine: str
) -> None:
    """Every disk and drive on its bus, in order; SeaBIOS and OVMF look at the boot disk first."""
    buses = target.buses
    transitional = _transitional(target, machine)
    ports = _ide_and_sata_ports(command, machine)
    rows: tuple[tuple[str, list[int | None]], ...] = (
        ("virtio-blk", buses.virtio_blk),
        ("ide", buses.ide),
        ("sata", buses.sata),
        ("virtio-scsi", buses.virtio_scsi),
        ("floppy", []),
    )
    for controller, fixed in rows:
        if controller == "floppy" and machine == "virt":
            continue  # it has no ISA bus
        removables = {r.slot or 0: r for r in buses.removables if r.controller == controller}
        slots = max([len(fixed), *(slot + 1 for slot in removables)])
        if slots and controller == "virtio-scsi":
            command.option("-device", f"virtio-scsi-pci{transitional}", id="scsi0")
        if slots and controller == "floppy" and machine == "q35":
            command.option("-device", "isa-fdc", id="fdc0")
        for slot in range(slots):
            where: dict[str, object] = {}
            if controller in ("ide", "sata"):
                # An empty slot keeps its place, as it does in the guest.
                where = next(ports[controller])
            elif controller == "virtio-scsi":
                where = {"bus": "scsi0.0", "scsi_id": slot}
            index = fixed[slot] if slot < len(fixed) else None
            if index is not None:
                _fixed_disk(command, controller, disks[index], index, where, target, machine)
            elif slot in removables:
                _drive(command, controller, removables[slot], where, slot)


def _fixed_disk(
    command: QemuCommand,
    controller: str,
    disk: TargetDisk,
    index: int,
    where: dict[str, object],
    target: TargetGuest,
    machine: str,
) -> None:
    devices = {
        "virtio-blk": f"virtio-blk-pci{_transitional(target, machine)}",
        "virtio-scsi": "scsi-hd",
    }
    command.option("-drive", if_="none", id=f"disk{index}", format=disk.format, file=disk.path)
    boot = {"bootindex": 1} if index == target.boot_disk else {}
    device = devices.get(controller, "ide-hd")
    command.option("-device", device, drive=f"disk{index}", **where, **boot)


def _drive(
    command: QemuCommand,
    controller: str,
    drive: SourceRemovable,
    where: dict[str, object],
    slot: int,
) -> None:
    """An empty drive; ``change`` in qemu's monitor puts something in."""
    if drive.type == "floppy":
        if controller == "floppy" and slot < 2:  # a controller has two at most
            command.option("-device", "floppy", unit=slot)
        return
    if controller in ("ide", "sata", "virtio-scsi"):
        device = "scsi-cd" if controller == "virtio-scsi" else "ide-cd"
        command.option("-device", device, **where)


def _ide_and_sata_ports(
    command: QemuCommand, machine: str
) -> dict[str, Iterator[dict[str, object]]]:
    """Return places for IDE and SATA disks; controllers are added to ``command`` as needed.

    pc has IDE with four places, q35 AHCI with six, where IDE disks go as well (qemu's if=ide does
    the same); what is more goes to AHCI controllers that are added.
    """

    def ahci() -> Iterator[dict[str, object]]:
        if machine == "q35":
            for port in range(_PORTS_OF_AHCI):
                yield {"bus": f"ide.{port}"}
        number = 0
        while True:
            command.option("-device", "ich9-ahci", id=f"ahci{number}")
            for port in range(_PORTS_OF_AHCI):
                yield {"bus": f"ahci{number}.{port}"}
            number += 1

    shared = ahci()

    def ide() -> Iterator[dict[str, object]]:
        if machine == "pc":
            for place in range(4):
                yield {"bus": f"ide.{place // 2}", "unit": place % 2}
        yield from shared

    return {"ide": ide(), "sata": shared}


def _nic(command: QemuCommand, nic: Nic, number: int, target: TargetGuest, machine: str) -> None:
    """A network behind qemu, whatever the mapping says: bridges need rights and set-up."""
    command.option("-netdev", "user", id=f"net{number}")
    net_bus = target.guestcaps.net_bus
    device = _NET_DEVICES.get(net_bus, "virtio-net-pci")
    if device == "virtio-net-pci":
        device += _transitional(target, machine)
    mac = {"mac": nic.mac} if nic.mac else {}
    command.option("-device", device, netdev=f"net{number}", **mac)


def _screen_and_sound(command: QemuCommand, source: SourceGuest, *, is_x86: bool) -> None:
    # Every guest has a driver for plain VGA.
    if is_x86:
        command.add("-vga", "std")
        command.add("-usb")
    else:
        command.option("-device", "virtio-gpu-pci")
        command.option("-device", "qemu-xhci")
        command.option("-device", "usb-kbd")
    command.option("-device", "usb-tablet")
    # The console and, after Ctrl-A C, qemu's monitor; Ctrl-C goes to the guest.
    command.add("-serial", "mon:stdio")
    card = (source.sound or "").lower()
    devices: dict[str, tuple[tuple[str, bool], ...]] = {
        "ac97": (("AC97", True),),
        "es1370": (("ES1370", True),),
        "ich6": (("intel-hda", False), ("hda-duplex", True)),
        "ich9": (("ich9-intel-hda", False), ("hda-duplex", True)),
        "sb16": (("sb16", True),),
        "usb": (("usb-audio", True),),
    }
    if not is_x86 or (card not in devices and card != "pcspk"):
        return
    command.add("-audiodev", Expansion('"${QEMU_AUDIO:-none},id=sound0"'))
    if card == "pcspk":
        command.option("-machine", pcspk_audiodev="sound0")
    for device, has_audio in devices.get(card, ()):
        command.option("-device", device, **({"audiodev": "sound0"} if has_audio else {}))


def _virtio_devices(
    command: QemuCommand, target: TargetGuest, machine: str, *, is_x86: bool
) -> None:
    caps = target.guestcaps
    suffix = _transitional(target, machine)
    if caps.virtio_rng:
        command.option("-object", "rng-random", filename="/dev/urandom", id="rng0")
        command.option("-device", f"virtio-rng-pci{suffix}", rng="rng0")
    if caps.virtio_balloon:
        command.option("-device", f"virtio-balloon-pci{suffix}")
    if caps.isa_pvpanic and is_x86:
        command.option("-device", "pvpanic", ioport="0x505")


def _transitional(target: TargetGuest, machine: str) -> str:
    """q35 has PCI Express slots, where a guest with drivers for virtio 0.9 needs another device."""
    return "-transitional" if machine == "q35" and not target.guestcaps.virtio_1_0 else ""


def _display(source: SourceGuest) -> str:
    """Return what is shown without QEMU_DISPLAY; servers listen on this machine only."""
    # What follows the kind are its keymap and where it listened, there.
    kind = (source.display or "").lower().partition(" ")[0]
    return {"vnc": "vnc=127.0.0.1:0,to=99", "spice": "spice"}.get(kind, "window")


def _context_id(name: str) -> int:
    """Return a vsock context id that other guests hardly have; 0 to 2 are taken."""
    return 3 + zlib.crc32(name.encode(errors="surrogateescape")) % (2**31 - 3)


def _program(arch: str) -> str:
    return f"qemu-system-{'x86_64' if arch in _X86 else arch}"


def _commas(value: str) -> str:
    return value.replace(",", ",,")


def _in_braces(path: str) -> str:
    """Return a path of firmware for use within ``"${NAME:-…}"``: none of them needs quoting."""
    if shlex.quote(path) != path:
        raise ValueError(f"the firmware's path needs quoting: {path}")
    return path


def _quoted(word: Word) -> str:
    return word.text if isinstance(word, Expansion) else shlex.quote(word)
