"""The mistakes people make, typed as they type them: a clear error and the right exit status."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import v2v_async
from tests.conftest import assert_gone, program, require


class Place:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp = folder / "tmp"
        self.out = folder / "out"
        self.tmp.mkdir()
        self.out.mkdir()
        self.disk = folder / "disk.img"
        with self.disk.open("wb") as file:
            file.truncate(1 << 20)

    def run(self, *argv: str, name: str = "virt-v2v-async") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*program(name), *argv],
            env={**os.environ, "TMPDIR": str(self.tmp)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert "Traceback" not in done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        return done

    def assert_nothing_left(self) -> None:
        assert_gone(str(self.folder))
        assert list(self.out.iterdir()) == []
        assert [path.name for v2v in self.tmp.iterdir() for path in v2v.iterdir()] in ([], ["log"])


@pytest.fixture
def place(short_tmp: Path) -> Iterator[Place]:
    require("nbdkit", "qemu-img", "virt-v2v-in-place")
    made = Place(short_tmp)
    yield made
    made.assert_nothing_left()


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        ("-i disk FOLDER/missing.img -o local -os OUT", 1, "missing.img’ can't be read: No such"),
        ("-i disk FOLDER -o local -os OUT", 1, "is a directory, not a disk image"),
        ("-i disk EMPTY -o local -os OUT", 1, "is empty (0 bytes)"),
        ("-i disk DISK FOLDER/second.img -o local -os OUT", 1, "disk 2"),
        ("-i disk DISK -if nosuch -o local -os OUT", 2, "unknown format ‘-if nosuch’"),
        ("-i disk DISK -if qcow2 -o local -os OUT", 1, "as qcow2"),
        ("-i disk nbd+unix:///?socket=FOLDER/nobody -o null", 1, "can't connect"),
        ("-i disk nbd://localhost:1/x -o null", 1, "can't connect"),
        ("-i disk DISK -o nosuch -os OUT", 2, "nosuch"),
        ("-i disk DISK -o local", 2, "no directory was named"),
        ("-i disk DISK -o local -os FOLDER/absent", 2, "does not exist"),
        ("-i disk DISK -o local -os DISK", 2, "not a directory"),
        ("-i disk DISK -o local -os OUT -of vdi", 2, "vdi"),
        ("-i disk DISK -o local -os OUT -of raw -oo compressed", 2, "compressed"),
        ("-i disk DISK -o local -os OUT -on a/b", 2, "a/b"),
        ("-i disk -o local -os OUT", 2, "no disk"),
        ("-i disk DISK DISK -o null", 2, "named twice"),
        ("-i nosuch DISK -o null", 2, "nosuch"),
        ("-i ova DISK -o null", 1, "OVA"),
        ("-i libvirtxml DISK -o null", 1, "XML"),
        ("-i disk FOLDER/missing.img -o local -os FOLDER/absent", 1, "also:"),
        ("-i disk DISK -o openstack", 2, "server-id"),
        ("-i disk DISK -o rhv-upload -os data", 2, "-oc"),
        ("-i disk DISK -o null --nosuch", 2, "nosuch"),
        ("-i disk DISK -o null --mac nonsense", 2, "mac"),
        ("-i disk DISK -o null --parallel 0", 2, "parallel"),
        ("-i disk DISK -o null -n a:b -n a:c", 2, "a"),
    ],
)
def test_a_mistake_is_told(place: Place, argv: str, status: int, said: str) -> None:
    empty = place.folder / "empty.img"
    empty.touch()
    names = {"EMPTY": empty, "DISK": place.disk, "OUT": place.out, "FOLDER": place.folder}
    for word, path in names.items():
        argv = argv.replace(word, str(path))
    done = place.run(*argv.split())
    assert done.returncode == status, done.stderr
    assert "virt-v2v-async: error: " in done.stderr
    assert said in done.stderr, done.stderr


def test_a_disk_that_may_not_be_read(place: Place) -> None:
    """As root every file can be read, so somebody else tries."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    place.disk.chmod(0o600)
    place.folder.chmod(0o755)
    place.tmp.chmod(0o777)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    # The project's own folder may be closed to others, so its code is read from a copy.
    code = place.folder / "code"
    code.mkdir()
    shutil.copytree(Path(v2v_async.__file__).parent, code / "v2v_async")
    packages = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(place.tmp),
        "HOME": str(place.tmp),
        "PYTHONPATH": ":".join([str(code), *packages]),
    }
    importing = [*nobody, "/usr/bin/python3", "-c", "import v2v_async.guest, rich"]
    if subprocess.run(importing, env=environment, cwd="/", capture_output=True).returncode:
        pytest.skip("the virtual environment is closed to others")
    python = "from v2v_async.cli.main import virt_v2v_async; import sys; sys.exit(virt_v2v_async())"
    argv = ["-c", python, "-i", "disk", str(place.disk), "-o", "null"]
    done = subprocess.run(
        [*nobody, "/usr/bin/python3", *argv],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 1, done.stderr
    assert "Permission denied" in done.stderr


def test_print_source_is_virt_v2vs(place: Place) -> None:
    """The same words as virt-v2v's own, which only looks at the command line here."""
    require("virt-v2v")
    ours = place.run("-i", "disk", str(place.disk), "-if", "raw", "--print-source")
    assert ours.returncode == 0
    theirs = subprocess.run(
        ["virt-v2v", "-i", "disk", str(place.disk), "-if", "raw", "--print-source"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    described = theirs[theirs.index("Source guest information") :]
    # A row that versions after 2.6 have; programs that read the text look for labels.
    described = re.sub(r"^ *UEFI secureboot: .*\n", "", described, flags=re.MULTILINE)
    assert ours.stdout == described


def test_every_program_has_help_and_version(place: Place) -> None:
    names = ["v2v-async", "virt-v2v-async", "helper-v2v-convert", "helper-v2v-copy"]
    names += [f"helper-v2v-{n}" for n in ("input-disk", "output-null", "output-local")]
    for name in names:
        assert place.run("--help", name=name).returncode == 0
        version = place.run("--version", name=name)
        assert version.returncode == 0
        assert version.stdout.startswith(name)
