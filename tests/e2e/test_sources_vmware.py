"""A guest of VMware's, converted by the command itself: over HTTPS, and by (a stand-in for) VDDK.

libvirt asks a server that behaves like vCenter (tests/vcenter.py). All the while somebody looks for
the password wherever others could read it.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import vddk
from tests.conftest import assert_gone, program, require
from tests.e2e.test_convert import Place, domain_is_accepted
from tests.integration.servers import digest
from tests.vcenter import DATASTORE, PASSWORD, USER, Guest, VCenter
from v2v_async import vsphere

NAME = "My web server"
# What a session's cookie from tests/vcenter.py has in it.
_COOKIE = b"-5e55-10f0"


def spellings() -> list[bytes]:
    """The password as it may be written, and the cookie that is as good."""
    basic = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    escaped = [json.dumps(PASSWORD)[1:-1], json.dumps(PASSWORD, ensure_ascii=False)[1:-1]]
    return [PASSWORD.encode(), basic, _COOKIE, *(text.encode() for text in escaped)]


def tells(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return any(spelling in content for spelling in spellings())


class Spy:
    """Reads the command lines and environments of all processes, and all files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: set[str] = set()
        self.files: dict[str, tuple[int, int]] = {}
        """Name to its mode, and that of its folder."""
        self.looked = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.look()

    def look(self) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            for name in ("cmdline", "environ"):
                if tells(entry / name):
                    self.processes.add((entry / "cmdline").read_bytes().decode(errors="replace"))
        for path in self.folder.rglob("*"):
            # What conversion writes is large, and read by nobody but root.
            if path.is_file() and path.stat().st_size < 1 << 20 and tells(path):
                modes = (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777)
                self.files[path.name] = modes
        self.looked += 1

    def __enter__(self) -> Spy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def serving(folder: Path, disk: Path) -> Iterator[VCenter]:
    require("openssl", "nbdkit")
    (folder / "vc").mkdir()
    with VCenter(folder / "vc", Guest(NAME, [disk])) as vcenter:
        yield vcenter


def password_file(folder: Path) -> Path:
    path = folder / "vc" / "password"
    path.touch(0o600)
    path.write_text(PASSWORD + "\n")
    return path


def left_by_cookie_script(vcenter: VCenter) -> list[Path]:
    """Return nbdkit's files in /tmp that name this server: other tests have theirs there."""
    found = []
    for path in Path("/tmp").glob("errors??????"):
        with suppress(FileNotFoundError):
            if f":{vcenter.port}’" in path.read_text(errors="replace"):
                found.append(path)
    return found


def converted(place: Place, vcenter: VCenter, *argv: str) -> Spy:
    """Convert the guest, and check everything that the kinds of sources have in common."""
    (disk,) = vcenter.guest.disks
    before = digest(disk)
    events = place.folder / "events.jsonl"
    with Spy(place.tmp) as spy:
        done = place.run(
            *("-ic", vcenter.uri, "-ip", str(password_file(place.folder)), *argv, NAME),
            *("-o", "local", "-os", str(place.out), f"--events={events}", "-v"),
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(disk) == before
    assert_gone(str(place.tmp))
    assert {path.name for path in place.out.iterdir()} == {f"{NAME}-sda", f"{NAME}.xml"}
    assert list(place.tmp.iterdir()) == []
    domain_is_accepted(place.out / f"{NAME}.xml")
    assert left_by_cookie_script(vcenter) == []
    assert spy.looked > 3
    assert spy.processes == set()
    assert not tells(events)
    for text in (done.stdout, done.stderr, (place.out / f"{NAME}.xml").read_text()):
        assert not any(spelling.decode() in text for spelling in spellings())
    inspected = subprocess.run(
        ["qemu-img", "info", "--output=json", str(place.out / f"{NAME}-sda")],
        capture_output=True,
        check=True,
    )
    assert json.loads(inspected.stdout)["virtual-size"] == disk.stat().st_size
    return spy


def test_the_spy_sees_what_it_looks_for(short_tmp: Path) -> None:
    (short_tmp / "file").write_text(f"x{PASSWORD}y")
    (short_tmp / "file").chmod(0o644)
    waits = ["sh", "-c", "echo started; read line", "an argument"]
    for argv, added in (([*waits, PASSWORD], {}), (waits, {"SECRET": PASSWORD})):
        spy = Spy(short_tmp)
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **added}
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == b"started\n"  # what it is called is readable now
            spy.look()
            child.stdin.close()
        assert any("an argument" in line for line in spy.processes)
        assert spy.files == {"file": (0o644, 0o700)}


@pytest.mark.appliance
@pytest.mark.usefixtures("converting_once")
def test_over_https(short_tmp: Path, phony_guest: Path) -> None:
    place = Place(short_tmp)
    with serving(short_tmp, phony_guest / "system.img") as vcenter:
        spy = converted(place, vcenter)
        logins = [request for request in vcenter.requests if request.by == "password"]
        assert len(logins) == 1
    # The password is where it has to be for as long as the disks are served, and ours alone.
    assert spy.files == {"login": (0o600, 0o700), "session": (0o600, 0o700)}


@pytest.mark.appliance
@pytest.mark.usefixtures("converting_once")
def test_by_vddk(short_tmp: Path, phony_guest: Path) -> None:
    place = Place(short_tmp)
    with serving(short_tmp, phony_guest / "system.img") as vcenter:
        installed = vddk.install(short_tmp / "vddk")
        place.environment |= installed.environment
        login = vsphere.Login("127.0.0.1", vcenter.port, "", "", verify=False)
        installed.expect(
            server="127.0.0.1",
            user=USER,
            password=PASSWORD,
            vm=f"moref={vcenter.guest.moref}",
            thumbprint=vsphere.thumbprint(login),
            files={f"[{DATASTORE}] {NAME}/{NAME}.vmdk": str(vcenter.guest.disks[0])},
        )
        # The file with what the server expects has the password too.
        (short_tmp / "vddk" / "expected.json").chmod(0o600)
        spy = converted(place, vcenter, "-it", "vddk", "-io", f"vddk-libdir={installed.libdir}")
    assert spy.files.items() <= {".vddk": (0o600, 0o700)}.items()
    assert installed.calls("extents")


@pytest.mark.parametrize("kind", ["vcenter", "vddk"])
def test_the_helper_alone(short_tmp: Path, kind: str) -> None:
    """Its servers stay; the session can be renewed when it has ended; clean leaves nothing."""
    disk = short_tmp / "disk.img"
    disk.write_bytes(os.urandom(1 << 20))
    v2vdir = short_tmp / "v"
    v2vdir.mkdir()
    with serving(short_tmp, disk) as vcenter, Spy(v2vdir) as spy:
        environment = {**os.environ, "TMPDIR": str(short_tmp)}
        argv = ["--v2vdir", str(v2vdir), "-ic", vcenter.uri]
        argv += ["-ip", str(password_file(short_tmp)), NAME]
        if kind == "vddk":
            installed = vddk.install(short_tmp / "vddk")
            environment |= installed.environment
            login = vsphere.Login("127.0.0.1", vcenter.port, "", "", verify=False)
            installed.expect(
                user=USER,
                password=PASSWORD,
                vm="moref=vm-16",
                thumbprint=vsphere.thumbprint(login),
                files={f"[{DATASTORE}] {NAME}/{NAME}.vmdk": str(disk)},
            )
            argv[:0] = ["-io", f"vddk-libdir={installed.libdir}"]
        subprocess.run(
            [*program(f"helper-v2v-input-{kind}"), *argv], check=True, env=environment, timeout=120
        )
        try:
            vcenter.sessions.clear()
            spy.look()
            copied = short_tmp / "copy"
            uri = f"nbd+unix:///?socket={v2vdir}/in1"
            subprocess.run(["nbdcopy", uri, str(copied)], check=True, timeout=120)
            assert copied.read_bytes() == disk.read_bytes()
            source = json.loads((v2vdir / "metadata.in").read_text())
            assert source["disks"][0]["source"] == f"[{DATASTORE}] {NAME}/{NAME}.vmdk"
            assert source["disks"][0]["size"] == 1 << 20
        finally:
            stop(v2vdir)
    assert spy.processes == set()
    expected = {"login", "session"} if kind == "vcenter" else set()
    assert {name for name in spy.files if name != ".vddk"} == expected
    assert all(modes == (0o600, 0o700) for modes in spy.files.values())
    assert_gone(str(v2vdir))


def stop(v2vdir: Path) -> None:
    for record in json.loads((v2vdir / "state.json").read_text())["processes"]:
        os.killpg(record["pid"], signal.SIGTERM)


def test_print_source(short_tmp: Path) -> None:
    disk = short_tmp / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with serving(short_tmp, disk) as vcenter:
        argv = ["-ic", vcenter.uri, "-ip", str(password_file(short_tmp)), "--print-source", NAME]
        done = subprocess.run(
            [*program("virt-v2v-async"), *argv], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert f"source name: {NAME}" in done.stdout
    assert "hypervisor type: vmware" in done.stdout
    assert not any(spelling.decode() in done.stdout + done.stderr for spelling in spellings())
