"""-o libvirt with a real session libvirtd: defined and started, or gone without a trace."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import types
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from lxml import etree

from tests import libvirtd
from tests.conftest import processes_naming, require
from tests.integration.test_output_local import SOURCE, TARGET, content, expected, reporter, write
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Event
from v2v_async.model import Guestcaps, Nic, SourceTpm, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output import files, libvirt_calls
from v2v_async.output import libvirt as libvirt_output
from v2v_async.output.contract import Output
from v2v_async.output.file_disks import FileDisks
from v2v_async.output.libvirt_calls import TargetConnection, connected
from v2v_async.output.libvirt_pool import find_pool
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import MadeObject, V2VDir

pytestmark = pytest.mark.anyio
POOL = "images"


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


@pytest.fixture(scope="module")
def daemon() -> Iterator[tuple[Path, str]]:
    """One libvirtd for all tests here: its folder and its URI."""
    require("libvirtd", "qemu-system-x86_64")
    folder = Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))
    try:
        with libvirtd.session_libvirtd(folder) as uri:
            yield folder, uri
    finally:
        shutil.rmtree(folder)


@dataclass
class Host:
    """A pool of its own in the daemon, with nothing in it."""

    folder: Path
    uri: str
    pool: Path

    def output(self, **fields: Any) -> Output:
        options = OutputOptions(mode="libvirt", connection=self.uri, storage=POOL)
        return parse_output(replace(options, **fields))

    def domains(self) -> list[str]:
        with libvirtd.connection(self.uri) as libvirt:
            return [domain.name() for domain in libvirt.listAllDomains(0)]

    def volumes(self) -> list[str]:
        with libvirtd.connection(self.uri) as libvirt:
            return sorted(libvirt.storagePoolLookupByName(POOL).listVolumes())

    def assert_nothing_left(self) -> None:
        assert os.listdir(self.pool) == []
        assert (self.domains(), self.volumes()) == ([], [])


@pytest.fixture
def host(daemon: tuple[Path, str]) -> Iterator[Host]:
    folder, uri = daemon
    made = Host(folder, uri, folder / "pool")
    made.pool.mkdir()
    if os.geteuid() == 0:
        user = pwd.getpwnam(libvirtd.USER)
        os.chown(made.pool, user.pw_uid, user.pw_gid)
    with libvirtd.connection(uri) as libvirt:
        pool = libvirt.storagePoolDefineXML(
            f"<pool type='dir'><name>{POOL}</name><target><path>{made.pool}</path></target></pool>"
        )
        pool.create()
        try:
            yield made
        finally:
            for domain in libvirt.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
                domain.undefineFlags(4)  # with its NVRAM
            for pool in libvirt.listAllStoragePools(0):
                is_persistent = pool.isPersistent()
                if pool.isActive():
                    pool.destroy()
                if is_persistent:
                    pool.undefine()
            shutil.rmtree(made.pool)


@asynccontextmanager
async def copied(v2vdir: V2VDir, output: Output, name: str = "web") -> AsyncIterator[None]:
    """Run an output up to finalize, with a little data on each disk."""
    await output.check(reporter())
    await output.check_source(SOURCE, name, reporter())
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, name, servers, reporter())
        for disk in SOURCE.disks:
            await anyio.to_thread.run_sync(
                write, v2vdir.target_socket(disk.index), disk.index, 65536, 65536
            )
    yield


def target(name: str = "web", **changes: Any) -> TargetGuest:
    return TARGET.model_copy(update={"name": name, **changes})


async def make(
    host: Host, v2vdir: V2VDir, guest: TargetGuest, **fields: Any
) -> tuple[etree._Element, list[str]]:
    """Make a guest, as helpers would that run one after the other; return its XML and warnings."""
    events: list[Event] = []
    async with copied(v2vdir, host.output(**fields), guest.name):
        await host.output(**fields).finalize(v2vdir, guest, reporter(events))
    assert v2vdir.state.objects == []
    with libvirtd.connection(host.uri) as libvirt:
        root = etree.fromstring(libvirt.lookupByName(guest.name).XMLDesc(2))  # inactive
    return root, [event.text or "" for event in events if event.type == "warning"]


def start(host: Host, name: str = "web") -> etree._Element:
    """Start the guest, see that it runs, and return its XML then; nothing on its disks boots."""
    with libvirtd.connection(host.uri) as libvirt:
        domain = libvirt.lookupByName(name)
        domain.create()
        assert domain.state()[0] == 1  # running
        running = etree.fromstring(domain.XMLDesc(0))
        domain.destroy()
    return running


# Made.


@pytest.mark.parametrize("by", ["name", "uuid", "directory", "a link to the directory"])
async def test_pool_named_in_every_way(host: Host, v2vdir: V2VDir, by: str, tmp_path: Path) -> None:
    with libvirtd.connection(host.uri) as libvirt:
        uuid = libvirt.storagePoolLookupByName(POOL).UUIDString()
    (tmp_path / "link").symlink_to(host.pool)
    storage = {
        "name": POOL,
        "uuid": uuid.upper(),
        "directory": f"{host.pool}/",
        "a link to the directory": str(tmp_path / "link"),
    }[by]
    root, _ = await make(host, v2vdir, target(), storage=storage)
    assert [s.get("file") for s in root.findall("devices/disk/source")] == [
        f"{host.pool}/web-sda",
        f"{host.pool}/web-sdb",
    ]
    assert host.volumes() == sorted(os.listdir(host.pool)) == ["web-sda", "web-sdb"]


@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_defined_and_started(
    host: Host, v2vdir: V2VDir, tmp_path: Path, format_: str, allocation: str
) -> None:
    guest = target(
        nics=[Nic(mac="52:54:00:01:02:03")],
        guestcaps=Guestcaps(virtio_rng=True, virtio_balloon=True, virtio_socket=True),
    )
    root, warnings = await make(host, v2vdir, guest, format=format_, allocation=allocation)
    for index, path in enumerate(sorted(host.pool.iterdir()), 1):
        assert content(path, format_, tmp_path) == expected(index)
        status = path.stat()
        assert (status.st_blocks * 512 >= SOURCE.disks[0].size) == (allocation == "preallocated")
        # The session's user must be able to write to them.
        assert status.st_uid == host.pool.stat().st_uid
        umask = os.umask(0o077)
        os.umask(umask)
        assert status.st_mode & 0o777 == 0o666 & ~umask
    assert [d.get("type") for d in root.findall("devices/disk/driver")] == [format_] * 2
    [interface] = root.findall("devices/interface")
    assert interface.get("type") == "user"
    assert interface.xpath("mac/@address") == ["52:54:00:01:02:03"]
    assert any("no network ‘default’" in warning for warning in warnings)
    if root.get("type") == "qemu":
        assert any("KVM can't be used" in warning for warning in warnings)
    if not Path("/dev/vhost-vsock").exists():
        assert root.find("devices/vsock") is None
        assert any("no vsock" in warning for warning in warnings)
    start(host)


async def test_compressed(host: Host, v2vdir: V2VDir) -> None:
    await make(host, v2vdir, target(), format="qcow2", options=(("compressed", None),))
    argv = ["qemu-img", "check", "--output=json", str(host.pool / "web-sda")]
    checked = subprocess.run(argv, capture_output=True, check=True)
    assert b'"compressed-clusters": 1' in checked.stdout


@pytest.mark.parametrize("is_secure", [False, True], ids=["plain", "secure boot"])
async def test_uefi(host: Host, v2vdir: V2VDir, is_secure: bool) -> None:
    """libvirt chooses firmware that is right, and starts the guest with it."""
    if not Path("/usr/share/OVMF").exists():
        pytest.skip("no OVMF here")
    guest = target(firmware="uefi", secure_boot=is_secure)
    await make(host, v2vdir, guest)
    root = start(host)
    loader = root.find("os/loader")
    assert loader is not None, "it was given its firmware"
    assert (loader.get("secure") == "yes") == is_secure
    assert (root.find("features/smm") is not None) == is_secure


async def test_a_tpm(host: Host, v2vdir: V2VDir) -> None:
    """The guest is started with one that is alive; without swtpm see tests/unit."""
    require("swtpm", "swtpm_setup")
    source = SOURCE.model_copy(update={"tpm": SourceTpm(model="tpm-crb", version="2.0")})
    root, warnings = await make(host, v2vdir, target(source=source))
    assert root.xpath("devices/tpm/@model") == ["tpm-crb"]
    assert any("new, empty TPM" in warning for warning in warnings)
    with libvirtd.connection(host.uri) as libvirt:
        domain = libvirt.lookupByName("web")
        domain.create()
        assert domain.state()[0] == 1  # running
        emulators = processes_naming(f"{domain.UUIDString()}/tpm2")
        domain.destroy()
    assert any("swtpm socket" in each for each in emulators), emulators


@pytest.mark.parametrize("display", ["window", "sdl", "spice", "vnc on port 5901"])
async def test_displays(host: Host, v2vdir: V2VDir, display: str) -> None:
    """A daemon has no screen for a window."""
    source = SOURCE.model_copy(update={"display": display})
    root, warnings = await make(host, v2vdir, target(source=source))
    [graphics] = root.findall("devices/graphics")
    with libvirtd.connection(host.uri) as libvirt:
        known = etree.fromstring(libvirt.getDomainCapabilities())
    has_spice = bool(known.xpath("devices/graphics/enum[@name='type']/value[.='spice']"))
    is_spice = display == "spice" and has_spice  # Debian 13 packs it apart from qemu
    assert graphics.get("type") == ("spice" if is_spice else "vnc")
    assert any("SDL" in warning for warning in warnings) == (display == "sdl")
    start(host)


@pytest.mark.parametrize(
    "name", ['we<b> & "co"', "$(w)'`w`;", "a,b=c", "-dash", "café 😀", "x" * 200]
)
async def test_awkward_names(host: Host, v2vdir: V2VDir, name: str, tmp_path: Path) -> None:
    await make(host, v2vdir, target(name))
    assert sorted(os.listdir(host.pool)) == [f"{name}-sda", f"{name}-sdb"]
    assert content(host.pool / f"{name}-sda", "raw", tmp_path) == expected(1)
    assert host.domains() == [name]
    if len(name) <= 20:  # with more the daemon's own folder is too deep, here, for its sockets
        start(host, name)


@pytest.mark.parametrize("name", ["../escaped", "a/b", "..", "a\0b", "a\nb", " ", "x" * 300])
async def test_names_that_can_not_be(host: Host, v2vdir: V2VDir, name: str) -> None:
    output = host.output()
    with pytest.raises((UsageError, TargetError), match="can't be the name|too long"):
        await output.check_source(SOURCE, name, reporter())
    async with running_servers(v2vdir) as servers:
        with pytest.raises((UsageError, TargetError)):
            await output.setup(v2vdir, SOURCE, name, servers, reporter())
    host.assert_nothing_left()


# Refused before the conversion.


async def refused(output: Output, name: str = "web") -> V2VError:
    with pytest.raises((TargetError, UsageError)) as caught:
        await output.check(reporter())
        await output.check_source(SOURCE, name, reporter())
    assert caught.value.hint
    return caught.value


async def test_a_name_that_is_taken(host: Host, v2vdir: V2VDir) -> None:
    """Neither that guest nor its disk is touched."""
    with libvirtd.connection(host.uri) as libvirt:
        libvirt.defineXML(
            "<domain type='qemu'><name>web</name><memory>65536</memory>"
            "<os><type>hvm</type></os></domain>"
        )
    error = await refused(host.output())
    assert "has a guest ‘web’ already" in error.message
    assert f"virsh -c '{host.uri}' undefine web" in (error.hint or "")
    (host.pool / "db-sdb").write_text("another guest's")
    error = await refused(host.output(), "db")
    assert f"‘{host.pool}/db-sdb’ is there already" in error.message
    await host.output().abandon(v2vdir, reporter())
    assert host.domains() == ["web"]
    assert (host.pool / "db-sdb").read_text() == "another guest's"


async def test_a_name_taken_while_the_guest_was_copied(host: Host, v2vdir: V2VDir) -> None:
    output = host.output()
    async with copied(v2vdir, output):
        (host.pool / "web-sdb").write_text("another guest's")
        with pytest.raises(TargetError, match="is there already"):
            await output.finalize(v2vdir, target(), reporter())
    await output.abandon(v2vdir, reporter())
    assert os.listdir(host.pool) == ["web-sdb"]
    assert (host.pool / "web-sdb").read_text() == "another guest's"
    assert host.domains() == []


async def test_pools_that_can_not_be(host: Host, tmp_path: Path) -> None:
    error = await refused(host.output(storage="imagse"))
    assert "no storage pool ‘imagse’" in error.message
    assert error.hint == "it has ‘images’: give one with -os"
    error = await refused(host.output(storage=None))
    assert "no storage pool ‘default’ (the default)" in error.message
    error = await refused(host.output(storage=str(tmp_path)))
    assert "is no storage pool" in error.message
    assert f"--target {tmp_path}; or write just files: -o local" in (error.hint or "")
    with libvirtd.connection(host.uri) as libvirt:
        libvirt.storagePoolDefineXML(
            "<pool type='logical'><name>vg</name><source><name>vg</name></source>"
            "<target><path>/dev/vg</path></target></pool>"
        )
        error = await refused(host.output(storage="vg"))
        assert "is of the type ‘logical’" in error.message
        libvirt.storagePoolLookupByName(POOL).destroy()
    error = await refused(host.output())
    assert "‘images’ is not active" in error.message
    assert (error.hint or "").endswith("pool-start images")
    error = await refused(host.output(storage=str(host.pool)))
    assert "‘images’ is not active" in error.message


async def test_the_command_in_the_hint_makes_a_pool(
    host: Host, v2vdir: V2VDir, tmp_path: Path
) -> None:
    require("virsh")
    directory = host.folder / "new pool"
    directory.mkdir(mode=0o777)
    error = await refused(host.output(storage=str(directory)))
    command = (error.hint or "").removeprefix("make a pool of it: ").partition("; or")[0]
    subprocess.run(["sh", "-ec", command], check=True, capture_output=True)
    try:
        await host.output(storage=str(directory)).check(reporter())
    finally:
        shutil.rmtree(directory)


async def test_a_full_file_system(host: Host, v2vdir: V2VDir) -> None:
    options = ["-t", "tmpfs", "-o", "size=6m,mode=777", "tmpfs"]
    mounted = subprocess.run(["mount", *options, str(host.pool)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        output = host.output(allocation="preallocated")
        error = await refused(output)
        assert "preallocated disks need" in error.message
        # The room goes between the check and the making.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("v2v_async.output.files.free_space", lambda directory: 1 << 40)
            with pytest.raises(TargetError, match="No space left"):
                async with running_servers(v2vdir) as servers:
                    await output.setup(v2vdir, SOURCE, "web", servers, reporter())
        await output.abandon(v2vdir, reporter())
        host.assert_nothing_left()
    finally:
        subprocess.run(["umount", str(host.pool)], check=True)


async def test_nobody_listens(short_tmp: Path) -> None:
    uri = f"qemu+unix:///session?socket={short_tmp}/absent"
    options = OutputOptions(mode="libvirt", connection=uri)
    error = await refused(parse_output(options))
    assert error.message.startswith(f"{uri} can't be connected to: ")
    assert "(-oc)" in (error.hint or "")


async def test_a_password(tmp_path: Path) -> None:
    """Of the daemon's own login; libvirt's test driver asks for one as well."""
    (tmp_path / "images").mkdir()
    (tmp_path / "host.xml").write_text(
        "<node><auth><user password='s3cret'>alice</user></auth><pool type='dir'>"
        f"<name>default</name><target><path>{tmp_path}/images</path></target></pool></node>"
    )
    options = OutputOptions(mode="libvirt", connection=f"test://alice@{tmp_path}/host.xml")
    error = await refused(parse_output(options))
    assert "wants a password" in error.message
    assert "-op FILE" in (error.hint or "")
    error = await refused(parse_output(replace(options, password=Secret("wr0ng"))))
    assert "authentication failed" in error.message
    assert "wr0ng" not in str(vars(error))
    await parse_output(replace(options, password=Secret("s3cret"))).check(reporter())


async def test_another_machine(
    host: Host, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A directory of the same name is not enough: the other side has to see what is written."""
    monkeypatch.setattr(libvirt_output, "is_remote", lambda uri: True)
    await host.output().check(reporter())
    host.assert_nothing_left()

    real = find_pool
    elsewhere = str(tmp_path)

    async def pool_elsewhere(*given: Any) -> Any:
        return replace(await real(*given), path=elsewhere)

    monkeypatch.setattr(libvirt_output, "find_pool", pool_elsewhere)
    error = await refused(host.output())
    assert "is on another machine" in error.message
    assert "-o local" in (error.hint or "")
    elsewhere = str(tmp_path / "absent")
    error = await refused(host.output())
    assert "is on another machine" in error.message
    assert os.listdir(tmp_path) == []
    host.assert_nothing_left()


# Nothing half-made.


async def test_libvirt_refuses_the_guest(host: Host, v2vdir: V2VDir) -> None:
    """The disks had their names by then."""
    guest = target(nics=[Nic(mac="01:00:5e:00:00:01")])
    output = host.output()
    async with copied(v2vdir, output):
        with pytest.raises(
            TargetError, match="does not define the new guest: .*multicast"
        ) as caught:
            await output.finalize(v2vdir, guest, reporter())
    assert caught.value.__cause__ is not None
    host.assert_nothing_left()
    assert v2vdir.state.objects == []
    await output.abandon(v2vdir, reporter())
    host.assert_nothing_left()


async def test_libvirt_does_not_answer(
    host: Host, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest may come when nobody looks any more: then it is said how to be rid of it."""
    define, go_on = TargetConnection.define, threading.Event()

    async def hanging(self: TargetConnection, xml: bytes) -> None:
        real = self._raw
        self._raw = types.SimpleNamespace(defineXML=lambda text: go_on.wait(60))
        try:
            await define(self, xml)
        finally:
            self._raw = real

    monkeypatch.setattr(libvirt_calls, "DEFINE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(TargetConnection, "define", hanging)
    events: list[Event] = []
    output = host.output()
    try:
        async with copied(v2vdir, output):
            with pytest.raises(TargetError, match="no answer within"):
                await output.finalize(v2vdir, target(), reporter(events))
    finally:
        go_on.set()
    told = [event.text or "" for event in events if "may still define" in (event.text or "")]
    assert len(told) == 1
    assert f"virsh -c '{host.uri}' undefine " in told[0]
    host.assert_nothing_left()


async def test_a_call_that_was_given_up_keeps_its_connection(host: Host) -> None:
    """libvirt would go on with what was freed, and the program might crash."""
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    told: list[object] = []

    def slow(raw: Any) -> None:
        began.set()
        go_on.wait(60)
        told.append(raw.isAlive())
        ended.set()

    async with connected(host.uri, None) as connection:
        raw = connection._raw
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connection._ask, lambda: slow(raw), "")
                await anyio.to_thread.run_sync(began.wait)
                scope.cancel()
    assert raw.isAlive(), "not closed yet"
    go_on.set()
    await anyio.to_thread.run_sync(ended.wait)
    assert told == [1]
    with anyio.fail_after(10):
        while connection._calls:
            await anyio.lowlevel.checkpoint()


async def test_what_the_host_can_not_run_is_told_before_the_copy(
    host: Host, v2vdir: V2VDir
) -> None:
    v2vdir.write_target(target(guestcaps=Guestcaps(arch="sparc64")))
    output = host.output()
    async with running_servers(v2vdir) as servers:
        with pytest.raises(TargetError, match="can't run sparc64 guests"):
            await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    host.assert_nothing_left()


WAYS: dict[str, tuple[Any, str]] = {
    "look up": (TargetConnection, "has_domain"),
    "make a disk": (FileDisks, "_make_disk"),
    "flush": (files, "sync"),
    "publish": (FileDisks, "publish"),
    "refresh": (TargetConnection, "refresh_pool"),
    "define": (TargetConnection, "define"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["cancelled", "failed"])
async def test_stopped_anywhere(
    host: Host, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch, way: str, after: bool, kind: str
) -> None:
    """Each step of setup and finalize, stopped before and after it was done."""
    output = host.output()
    scope = anyio.CancelScope()
    stopped = 0

    def stop() -> None:
        nonlocal stopped
        stopped += 1
        if kind == "failed":
            raise TargetError("as arranged")
        scope.cancel()

    def arrange() -> None:
        holder, name = WAYS[way]
        real = getattr(holder, name)

        async def step(*given: Any, **more: Any) -> Any:
            if not after and not stopped:
                stop()
            result = await real(*given, **more)
            if after and not stopped:
                stop()
            return result

        monkeypatch.setattr(holder, name, step)

    if way in ("look up", "make a disk"):
        arrange()
    try:
        with scope:
            async with copied(v2vdir, output):
                if way not in ("look up", "make a disk"):
                    arrange()
                await output.finalize(v2vdir, target(), reporter())
                await anyio.lowlevel.checkpoint()
    except TargetError as error:
        if error.message != "as arranged":
            raise
    assert stopped == 1
    if way == "refresh" and kind == "failed":
        # Only a warning: the guest is whole.
        assert (host.domains(), sorted(os.listdir(host.pool))) == (["web"], ["web-sda", "web-sdb"])
        return
    monkeypatch.undo()
    # Another process cleans up: it has only the directory.
    await host.output().abandon(V2VDir(v2vdir.path), reporter())
    host.assert_nothing_left()
    assert v2vdir.state.objects == []


async def test_where_libvirt_is_gone_the_commands_are_told(
    host: Host, v2vdir: V2VDir, short_tmp: Path
) -> None:
    """Disks are removed all the same."""
    disk = host.pool / "web-sda"
    disk.touch()
    gone = f"qemu+unix:///session?socket={short_tmp}/absent"
    guest = MadeObject(kind="guest", name="4dea22b3-0000-0000-0000-000000000001", undo="virsh x")
    v2vdir.add_object(MadeObject(kind="disk", name=str(disk), undo=f"rm {disk}"))
    v2vdir.add_object(guest)
    events: list[Event] = []
    await host.output(connection=gone).abandon(v2vdir, reporter(events))
    [warning] = [event.text or "" for event in events if event.type == "warning"]
    assert warning.endswith("remove it with: virsh x")
    assert v2vdir.state.objects == [guest]
    # The next one that has a daemon to ask finds that there is no such guest.
    await host.output().abandon(v2vdir, reporter(events))
    assert len(events) == 1
    assert v2vdir.state.objects == []
    host.assert_nothing_left()
