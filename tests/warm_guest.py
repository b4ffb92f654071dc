"""A guest of a real libvirtd that runs without an operating system, and writes when told to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import libvirtd
from tests.integration.servers import MIB, fragmented
from tests.waiting import wait_until

NAME = "g"
_SIZES = (16 * MIB, 6 * MIB)


class WarmGuest:
    """A guest of two disks. ``contents``: what its disks hold, as far as it was told to write."""

    def __init__(
        self, folder: Path, uri: str, domain: Any, paths: list[Path], contents: list[bytearray]
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.domain = domain
        self.paths = paths
        self.contents = contents
        self._noise = random.Random(7)

    def write(self, disk: int, offset: int, length: int, pattern: int | None = None) -> None:
        """Have the guest's own device write a byte again and again (0: as zeroes)."""
        pattern = self._noise.randrange(1, 256) if pattern is None else pattern
        how = (
            f"write -z {offset} {length}"
            if pattern == 0
            else (f"write -P {pattern} {offset} {length}")
        )
        self.monitor(f'qemu-io -d ide0-0-{disk} "{how}"')
        self.contents[disk][offset : offset + length] = bytes([pattern]) * length

    def write_here_and_there(self, count: int = 6) -> None:
        """Write some blocks of all disks, a few of them zeroes."""
        for disk, content in enumerate(self.contents):
            for number in range(count):
                length = self._noise.choice([512, 4096, 65536, 200 * 512])
                offset = self._noise.randrange((len(content) - length) // 512) * 512
                self.write(disk, offset, length, 0 if number % 3 == 2 else None)

    def monitor(self, command: str) -> str:
        """Ask the monitor of its qemu."""
        import libvirt_qemu

        said = libvirt_qemu.qemuMonitorCommand(
            self.domain, command, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        )
        assert "rror" not in said, said
        return str(said)

    def start(self) -> None:
        self.domain.create()

    def stop(self) -> None:
        """Turn it off as a shutdown does: qemu saves its bitmaps."""
        self.domain.destroyFlags(1)  # gracefully

    def kill(self) -> None:
        """Kill its qemu."""
        pid = int(next((self.folder / "run").rglob(f"{NAME}.pid")).read_text())
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.domain.isActive(), "it is off")

    def checkpoints(self) -> list[str]:
        return sorted(each.getName() for each in self.domain.listAllCheckpoints(0))

    def has_job(self) -> bool:
        return bool(self.domain.jobInfo()[0])

    def bitmaps(self) -> list[str]:
        """Which bitmaps are in the images, the guest being off."""
        found = []
        for path in self.paths:
            argv = ["qemu-img", "info", "-U", str(path)]
            said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            found += [line.split()[-1] for line in said.splitlines() if " name: " in line]
        return found


@contextmanager
def warm_guest(
    folder: Path, image_format: str = "qcow2", *, system: tuple[Path, Path] | None = None
) -> Iterator[WarmGuest]:
    """Have a guest, which is off, with its own libvirtd.

    ``system``: a kernel and a RAM disk, which say what they do in ``folder/serial``; its disks are
    empty then.
    """
    images = folder / "images"
    images.mkdir()
    paths, contents, disks = [], [], []
    for number, size in enumerate(_SIZES):
        plain = fragmented(folder / "plain", size, seed=number + 20)
        if system is not None:
            plain.write_bytes(bytes(size))
        contents.append(bytearray(plain.read_bytes()))
        path = images / f"disk{number}.{image_format}"
        argv = ["qemu-img", "convert", "-O", image_format, str(plain), str(path)]
        subprocess.run(argv, check=True)
        plain.unlink()
        path.chmod(0o666)
        paths.append(path)
        disks.append(
            f"<disk type='file' device='disk'><driver name='qemu' type='{image_format}'/>"
            f"<source file='{path}'/><target dev='hd{'ab'[number]}' bus='ide'/></disk>"
        )
    images.chmod(0o777)
    (folder / "sockets").mkdir()
    (folder / "sockets").chmod(0o777)
    booted, devices = "", ""
    if system is not None:
        serial = folder / "serial"
        serial.touch()
        serial.chmod(0o666)
        booted = (
            f"<kernel>{system[0]}</kernel><initrd>{system[1]}</initrd>"
            "<cmdline>console=ttyS0 quiet panic=1</cmdline>"
        )
        devices = f"<serial type='file'><source path='{serial}' append='on'/></serial>"
    with libvirtd.session_libvirtd(folder) as uri, libvirtd.connection(uri) as libvirt:
        domain = libvirt.defineXML(
            f"<domain type='qemu'><name>{NAME}</name><memory>196608</memory>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type>{booted}</os>"
            f"<features><acpi/></features><devices>{''.join(disks)}{devices}"
            "<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
        )
        guest = WarmGuest(folder, uri, domain, paths, contents)
        del domain
        try:
            yield guest
        finally:
            del guest.domain  # it would keep the connection open
