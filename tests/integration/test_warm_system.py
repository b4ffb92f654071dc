"""Warm migration of a guest of the system's libvirtd, whose qemu is another user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import libvirtd
from tests.conftest import assert_gone, processes_naming, program, require
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import MIB, fragmented
from tests.integration.test_warm_digests import CONVERTED


def test_from_start_to_cutover(short_tmp: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the system's libvirtd is root's")
    require("libvirtd", "qemu-system-x86_64", "qemu-nbd", "nsenter")
    plain = fragmented(short_tmp / "plain", 8 * MIB)
    image, out = short_tmp / "disk.qcow2", short_tmp / "out"
    out.mkdir()
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(plain), str(image)], check=True)
    with (
        libvirtd.system_libvirtd(short_tmp) as uri,
        libvirtd.connection(uri) as connection,
    ):
        # The guests' folders are where they always are, in the daemon's namespace only.
        [daemon] = [
            line.partition(":")[0]
            for line in processes_naming(f"{short_tmp}/libvirtd.conf")
            if line.split(": ", 1)[1].startswith("libvirtd")
        ]

        def does(command: str, *words: str) -> str:
            # The root too: it may be another than that of the namespace (scripts/on-debian).
            argv = ["nsenter", f"--mount=/proc/{daemon}/ns/mnt", f"--root=/proc/{daemon}/root"]
            argv += [
                *program("v2v-async"),
                "warm",
                command,
                "--state",
                str(short_tmp / "state"),
                *words,
            ]
            environment = {
                **os.environ,
                "PATH": f"{REPLAY}:{os.environ['PATH']}",
                "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
                "TMPDIR": str(short_tmp),
            }
            done = subprocess.run(
                argv, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        domain = connection.defineXML(
            "<domain type='qemu'><name>a guest with a long name</name><memory>65536</memory>"
            "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source file='{image}'/><target dev='vda' bus='virtio'/></disk>"
            "<disk type='file' device='cdrom'><target dev='hdc' bus='ide'/></disk>"
            "<controller type='usb' model='none'/><memballoon model='none'/>"
            "</devices></domain>"
        )
        domain.create()
        words = ["-i", "libvirt", "-ic", uri, "-o", "local", "-os", str(out), "-on", "moved"]
        does("start", *words, "a guest with a long name")
        does("sync")
        assert len(domain.listAllCheckpoints(0)) == 1
        domain.destroyFlags(1)
        does("cutover")
        assert domain.listAllCheckpoints(0) == []
        del domain
    expected = bytearray(plain.read_bytes())
    expected[MIB : MIB + len(CONVERTED)] = CONVERTED
    assert (out / "moved-sda").read_bytes() == expected
    assert not (short_tmp / "state").exists()
    assert_gone(str(short_tmp))
