"""-i libvirtxml and -i libvirt: every kind of disk behind its overlay, and libvirt itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import libvirtd
from tests.conftest import program, require
from tests.integration.servers import MIB, digest, fragmented, serve
from tests.integration.test_input_disk import (
    content,
    image,
    make_certificates,
    quiet,
    served,
    tcp_to,
    write,
)
from tests.range_server import range_server
from v2v_async import libvirt_connection
from v2v_async.errors import DependencyError, SourceError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


def document(*disks: str, kind: str = "kvm", more: str = "") -> str:
    return (
        f"<domain type='{kind}'><name>g</name><memory>65536</memory>{more}"
        f"<devices>{''.join(disks)}</devices></domain>"
    )


def disk(source: str, *, kind: str = "file", format_: str | None = "raw", more: str = "") -> str:
    driver = f"<driver name='qemu' type='{format_}'/>" if format_ else ""
    return (
        f"<disk type='{kind}' device='disk'>{driver}{source}<target dev='sda' bus='scsi'/>{more}"
        "</disk>"
    )


def file_disk(path: Path, format_: str | None = "raw", more: str = "") -> str:
    return disk(f"<source file='{path}'/>", format_=format_, more=more)


def web_disk(protocol: str, name: str, port: int, format_: str = "raw", more: str = "") -> str:
    source = (
        f"<source protocol='{protocol}' name='{name}'><host name='127.0.0.1' port='{port}'/>{more}"
        "</source>"
    )
    return disk(source, kind="network", format_=format_)


def options(folder: Path, *disks: str, more: tuple[tuple[str, str], ...] = ()) -> InputOptions:
    path = folder / "guest.xml"
    path.write_text(document(*disks))
    return InputOptions("libvirtxml", (str(path),), options=more)


async def read_all(folder: Path, given: InputOptions) -> tuple[SourceGuest, list[bytes]]:
    async with served(folder, given) as (v2vdir, guest):
        assert v2vdir.source_socket(1).exists()
        return guest, [await content(str(v2vdir.source_socket(d.index))) for d in guest.disks]


async def refused(given: InputOptions) -> SourceError:
    with pytest.raises(SourceError) as caught:
        await parse_input(given).check(quiet)
    return caught.value


# Files, devices, volumes.


@pytest.mark.parametrize("given", [True, False], ids=["format", "no format"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
async def test_a_file(short_tmp: Path, image_format: str, given: bool) -> None:
    path, expected = image(short_tmp, image_format)
    before = (digest(path), path.stat().st_mtime_ns)
    described = options(short_tmp, file_disk(path, image_format if given else None))
    async with served(short_tmp, described) as (v2vdir, guest):
        [found] = guest.disks
        assert (found.format, found.size, found.controller) == (image_format, len(expected), "scsi")
        assert found.files == [str(path)]
        assert await content(str(v2vdir.source_socket(1))) == expected
        await write(str(v2vdir.source_socket(1)))
        assert (await content(str(v2vdir.source_socket(1))))[65536:65544] == b"changed!"
    assert (digest(path), path.stat().st_mtime_ns) == before


async def test_if_goes_before_the_xml(short_tmp: Path) -> None:
    path, expected = image(short_tmp, "qcow2")
    given = options(short_tmp, file_disk(path, "raw"))
    given = InputOptions(given.mode, given.arguments, format="qcow2")
    _, [found] = await read_all(short_tmp, given)
    assert found == expected


async def test_the_qcow2_overlay_for_a_raw_disk(short_tmp: Path) -> None:
    path, expected = image(short_tmp, "raw")
    given = options(short_tmp, file_disk(path), more=(("overlay", "qcow2"),))
    async with served(short_tmp, given) as (v2vdir, _):
        assert (v2vdir.path / "overlay-1.qcow2").exists()
        assert await content(str(v2vdir.source_socket(1))) == expected


async def test_a_block_device(short_tmp: Path) -> None:
    require("losetup")
    path, expected = image(short_tmp, "raw")
    attached = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", str(path)], capture_output=True, text=True
    )
    if attached.returncode != 0:
        pytest.skip("no loop devices here")
    device = attached.stdout.strip()
    try:
        given = options(short_tmp, disk(f"<source dev='{device}'/>", kind="block"))
        guest, [found] = await read_all(short_tmp, given)
        assert guest.disks[0].source == device
        assert found == expected
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


async def test_a_relative_path_is_taken_from_the_current_directory(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = image(short_tmp, "raw")
    given = options(short_tmp, file_disk(Path(path.name)))
    error = await refused(given)
    assert "No such file" in error.message
    assert f"cd {short_tmp} first" in (error.hint or "")
    monkeypatch.chdir(short_tmp)
    _, [found] = await read_all(short_tmp, given)
    assert found == expected


async def test_all_problems_are_told_at_once(short_tmp: Path) -> None:
    path, _ = image(short_tmp, "raw")
    given = options(
        short_tmp,
        file_disk(short_tmp / "absent"),
        file_disk(path),
        web_disk("http", "x", 1),
        disk("<source protocol='nbd'><host name='127.0.0.1' port='1'/></source>", kind="network"),
    )
    error = await refused(given)
    for said in ("3 disks", "disk 1", "No such file", "disk 3", "http://127.0.0.1:1/x", "disk 4"):
        assert said in error.message


async def test_what_the_parser_left_out_is_told(short_tmp: Path) -> None:
    path, _ = image(short_tmp, "raw")
    events: list[Event] = []
    given = options(short_tmp, file_disk(path), disk("", kind="vhostuser"))
    await parse_input(given).check(Reporter(events.append, "t"))
    assert [e.type for e in events if "‘vhostuser’ is left out" in (e.text or "")] == ["warning"]


@contextlib.contextmanager
def a_host(folder: Path, *, guest: str = "", auth: str = "") -> Iterator[str]:
    """Have a host of libvirt's test driver: a pool ``images`` over ``folder``, maybe a guest."""
    volumes = "".join(
        f"<volume type='file'><name>{path.name}</name><capacity>{path.stat().st_size}</capacity>"
        f"<target><path>{path}</path><format type='{format_}'/></target></volume>"
        for path, format_ in ((folder / "raw.img", "raw"), (folder / "disk.qcow2", "qcow2"))
        if path.exists()
    )
    host = folder / "host.xml"
    host.write_text(
        f"<node>{auth}{guest}<pool type='dir'><name>images</name>"
        "<uuid>11111111-2222-3333-4444-555555555555</uuid>"
        f"<target><path>{folder}</path></target>{volumes}</pool></node>"
    )
    yield f"test://{host}"


OFF = (
    "<os><type arch='x86_64'>hvm</type></os><test:runstate "
    "xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>5</test:runstate>"
)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["libvirt", "libvirtxml"])
async def test_a_volume(
    short_tmp: Path, mode: str, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = image(short_tmp, image_format)
    # The volume knows its format; what the guest says of it does not matter.
    volume = disk(f"<source pool='images' volume='{path.name}'/>", kind="volume")
    guest = document(volume, kind="test", more=OFF)
    with a_host(short_tmp, guest=guest) as uri:
        if mode == "libvirt":
            given = InputOptions(mode, ("g",), connection=uri)
        else:
            monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
            given = options(short_tmp, volume)
        found, [read] = await read_all(short_tmp, given)
    assert found.disks[0].source == str(path)
    assert found.disks[0].format == image_format
    assert read == expected


async def test_volumes_that_are_not_there(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    image(short_tmp, "raw")
    given = options(
        short_tmp,
        disk("<source pool='images' volume='absent'/>", kind="volume"),
        disk("<source pool='nowhere' volume='raw.img'/>", kind="volume"),
    )
    with a_host(short_tmp) as uri:
        monkeypatch.setenv("LIBVIRT_DEFAULT_URI", uri)
        error = await refused(given)
    assert "disk 1: the volume ‘absent’ of the storage pool ‘images’ can't be found" in str(error)
    assert "disk 2: the volume ‘raw.img’ of the storage pool ‘nowhere’" in str(error)
    assert capfd.readouterr() == ("", ""), "libvirt prints nothing"


# Network disks.


@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_nbd(short_tmp: Path, transport: str) -> None:
    path, expected = image(short_tmp, "raw")
    async with running_servers(V2VDir(short_tmp)) as servers:
        await serve(servers, "far", short_tmp, "file", f"file={path}")
        async with contextlib.AsyncExitStack() as stack:
            if transport == "tcp":
                port = await stack.enter_async_context(tcp_to(short_tmp / "far"))
                host = f"<host name='127.0.0.1' port='{port}'/>"
            else:
                host = f"<host transport='unix' socket='{short_tmp}/far'/>"
            source = f"<source protocol='nbd'>{host}</source>"
            _, [found] = await read_all(short_tmp, options(short_tmp, disk(source, kind="network")))
    assert found == expected


@pytest.mark.parametrize("overlay", ["cow", "qcow2"])
async def test_http(short_tmp: Path, overlay: str) -> None:
    path, expected = image(short_tmp, "raw")
    path.rename(short_tmp / "ü 1%.img")
    with range_server(short_tmp) as server:
        given = options(
            short_tmp, web_disk("http", "ü 1%.img", server.port), more=(("overlay", overlay),)
        )
        async with served(short_tmp, given) as (v2vdir, guest):
            endpoint = str(v2vdir.source_socket(1))
            assert guest.disks[0].size == len(expected)
            assert await content(endpoint) == expected
            await write(endpoint)
            changed = await content(endpoint)
            assert changed[65536:65544] == b"changed!"
            assert changed[:65536] + changed[131072:] == expected[:65536] + expected[131072:]
    assert (short_tmp / "ü 1%.img").read_bytes() == expected


async def test_a_qcow2_image_behind_http(short_tmp: Path) -> None:
    path, expected = image(short_tmp, "qcow2")
    with range_server(short_tmp) as server:
        given = options(short_tmp, web_disk("http", path.name, server.port, "qcow2"))
        guest, [found] = await read_all(short_tmp, given)
    assert (guest.disks[0].format, guest.disks[0].size) == ("qcow2", len(expected))
    assert found == expected


async def test_http_with_a_query(short_tmp: Path) -> None:
    path, expected = image(short_tmp, "raw")
    with range_server(short_tmp) as server:
        server.query = "dcPath=a%20b&dsName=c"
        source = (
            f"<source protocol='http' name='{path.name}' query='dcPath=a%20b&amp;dsName=c'>"
            f"<host name='127.0.0.1' port='{server.port}'/></source>"
        )
        _, [found] = await read_all(short_tmp, options(short_tmp, disk(source, kind="network")))
    assert found == expected


async def test_a_web_server_that_fails_twice(short_tmp: Path) -> None:
    """The retry filter waits 2 s and 4 s."""
    path, expected = image(short_tmp, "raw")
    with range_server(short_tmp) as server:
        given = options(short_tmp, web_disk("http", path.name, server.port))
        async with served(short_tmp, given) as (v2vdir, _):
            server.failures = 2
            assert await content(str(v2vdir.source_socket(1))) == expected
            assert server.failures == 0


async def test_https(short_tmp: Path) -> None:
    """A certificate that nobody signed is refused, unless the XML says otherwise."""
    require("certtool")
    path, expected = image(short_tmp, "raw")
    make_certificates(short_tmp / "pki")
    with range_server(short_tmp, certificates=short_tmp / "pki") as server:
        error = await refused(options(short_tmp, web_disk("https", path.name, server.port)))
        assert f"the disk ‘https://127.0.0.1:{server.port}/{path.name}’ can't be read" in str(error)
        assert "certificate" in error.message
        unchecked = web_disk("https", path.name, server.port, more="<ssl verify='no'/>")
        (short_tmp / "v").rmdir() if (short_tmp / "v").exists() else None
        _, [found] = await read_all(short_tmp, options(short_tmp, unchecked))
    assert found == expected


async def test_a_page_that_is_not_there(short_tmp: Path) -> None:
    with range_server(short_tmp) as server:
        error = await refused(options(short_tmp, web_disk("http", "absent.img", server.port)))
    assert "404" in error.message
    assert error.disk == 1
    assert "curl -I" in (error.hint or "")


async def test_a_qcow2_image_over_nbd_is_refused(short_tmp: Path) -> None:
    source = f"<source protocol='nbd'><host transport='unix' socket='{short_tmp}/x'/></source>"
    error = await refused(options(short_tmp, disk(source, kind="network", format_="qcow2")))
    assert "is said to be qcow2" in error.message


# <checksum>


def checksum(path: Path, method: str = "sha256", fail: str = "error", *, right: bool = True) -> str:
    actual = hashlib.new(method, path.read_bytes()).hexdigest()
    expected = actual if right else actual[::-1]
    return f"<checksum method='{method}' fail='{fail}'>\n  {expected} </checksum>"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("method", ["md5", "sha256", "sha512"])
async def test_a_right_checksum(short_tmp: Path, method: str, image_format: str) -> None:
    """It is of what the guest sees, whatever the format."""
    path, expected = image(short_tmp, image_format)
    element = checksum(short_tmp / "raw.img", method)
    _, [found] = await read_all(
        short_tmp, options(short_tmp, file_disk(path, image_format, element))
    )
    assert found == expected


async def test_wrong_checksums_are_all_told(short_tmp: Path) -> None:
    paths = [fragmented(short_tmp / f"{n}.img", MIB, seed=n) for n in range(3)]
    given = options(
        short_tmp,
        file_disk(paths[0], more=checksum(paths[0], right=False)),
        file_disk(paths[1], more=checksum(paths[1])),
        file_disk(paths[2], more=checksum(paths[2], "md5", right=False)),
    )
    with pytest.raises(SourceError) as caught:
        async with served(short_tmp, given):
            pytest.fail("it must not be served")
    assert "2 disks" in str(caught.value)
    assert f"disk 1: the disk’s sha256 checksum is {digest(paths[0])}" in str(caught.value)
    assert "disk 3: the disk’s md5 checksum is" in str(caught.value)


@pytest.mark.parametrize(("fail", "type_"), [("warn", "warning"), ("print", "message")])
async def test_a_wrong_checksum_that_is_only_told(short_tmp: Path, fail: str, type_: str) -> None:
    path, _ = image(short_tmp, "raw")
    given = options(short_tmp, file_disk(path, more=checksum(path, fail=fail, right=False)))
    events: list[Event] = []
    reporter = Reporter(events.append, "t")
    v2vdir = V2VDir(short_tmp)
    source = parse_input(given)
    await source.check(reporter)
    async with running_servers(v2vdir) as servers:
        v2vdir.log_directory.mkdir()
        await source.setup(v2vdir, servers, reporter)
    told = [event for event in events if digest(path) in (event.text or "")]
    assert [(event.type, event.disk) for event in told] == [(type_, 1)]


# libvirt.


@pytest.fixture
def session(short_tmp: Path) -> Iterator[str]:
    require("libvirtd", "qemu-system-x86_64")
    with libvirtd.session_libvirtd(short_tmp) as uri:
        yield uri


async def test_a_guest_of_a_real_libvirtd(
    short_tmp: Path, session: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Off: served. Running, paused, unknown: refused, with the command that helps."""
    path, expected = image(short_tmp, "raw")
    path.chmod(0o666)
    before = digest(path)
    machine = "<os><type arch='x86_64' machine='pc'>hvm</type></os>"
    given = InputOptions("libvirt", ("g",), connection=session)
    with libvirtd.connection(session) as libvirt:
        domain = libvirt.defineXML(
            document(
                file_disk(path).replace("sda", "hda").replace("scsi", "ide"),
                "<graphics type='vnc' passwd='s3cret'><listen type='socket' "
                f"socket='{short_tmp}/vnc'/></graphics>",
                kind="qemu",
                more=machine,
            )
        )
        events: list[Event] = []
        async with served(short_tmp, given) as (v2vdir, guest):
            assert (guest.hypervisor, guest.disks[0].controller) == ("qemu", "ide")
            assert guest.display == (
                f"vnc with password listening on Unix domain socket {short_tmp}/vnc"
            )
            assert await content(str(v2vdir.source_socket(1))) == expected
        assert digest(path) == before

        by_uuid = InputOptions("libvirt", (domain.UUIDString(),), connection=session)
        source = parse_input(by_uuid)
        await source.check(quiet)
        assert (await source.describe()).name == "g"

        domain.create()
        error = await refused(given)
        assert "the guest ‘g’ is running" in error.message
        assert error.hint == f"shut it down first: virsh -c '{session}' shutdown g"
        domain.suspend()
        error = await refused(given)
        assert "the guest ‘g’ is paused" in error.message
        assert "resume g && virsh" in (error.hint or "")
        domain.resume()
        domain.managedSave(0)
        await parse_input(given).check(Reporter(events.append, "t"))
        assert [e.type for e in events if "virsh managedsave" in (e.text or "")] == ["warning"]
        domain.managedSaveRemove(0)

        error = await refused(InputOptions("libvirt", ("h",), connection=session))
        assert "has no guest ‘h’" in error.message
        assert error.hint == "it has ‘g’"
        domain.undefine()
        error = await refused(given)
        assert "no guests at all" in (error.hint or "")
    assert capfd.readouterr().err == "", "libvirt prints nothing"


async def test_a_pool_of_a_real_libvirtd(short_tmp: Path, session: str) -> None:
    """A volume is found by its pool, as soon as the pool is active."""
    (short_tmp / "pool").mkdir()
    path, expected = image(short_tmp / "pool", "qcow2")
    for each in [path.parent, *path.parent.iterdir()]:
        each.chmod(0o777)
    volume = disk(f"<source pool='p' volume='{path.name}'/>", kind="volume")
    machine = "<os><type arch='x86_64' machine='pc'>hvm</type></os>"
    given = InputOptions("libvirt", ("g",), connection=session)
    with libvirtd.connection(session) as libvirt:
        pool = libvirt.storagePoolDefineXML(
            f"<pool type='dir'><name>p</name><target><path>{path.parent}</path></target></pool>"
        )
        libvirt.defineXML(
            document(
                volume.replace("scsi", "virtio").replace("sda", "vda"), kind="qemu", more=machine
            )
        )
        error = await refused(given)
        assert "storage pool 'p' is not active" in error.message
        pool.create()
        _, [found] = await read_all(short_tmp, given)
    assert found == expected


async def test_nobody_listens(short_tmp: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"qemu+unix:///session?socket={short_tmp}/absent"
    error = await refused(InputOptions("libvirt", ("g",), connection=uri))
    assert error.message.startswith(f"{uri} can't be connected to: ")
    assert "No such file" in error.message
    assert capfd.readouterr() == ("", "")


def test_who_is_stopped_while_libvirt_hangs_ends_at_once() -> None:
    """A server takes the connection and says nothing; libvirt would wait for ever."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        silent.settimeout(30)
        uri = f"qemu+tcp://127.0.0.1:{silent.getsockname()[1]}/system"
        argv = [*program("virt-v2v-async"), "-i", "libvirt", "-ic", uri, "g", "--print-source"]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            connection, _ = silent.accept()
            with connection:
                child.send_signal(signal.SIGINT)
                _, told = child.communicate(timeout=60)
        finally:
            child.kill()
            child.wait()
    assert child.returncode == 128 + signal.SIGINT
    assert "Traceback" not in told


AUTH = "<auth><user password='s3cret'>alice</user></auth>"


async def test_a_password(short_tmp: Path) -> None:
    path, _ = image(short_tmp, "raw")
    guest = document(file_disk(path), kind="test", more=OFF)
    with a_host(short_tmp, guest=guest, auth=AUTH) as uri:
        uri = uri.replace("test://", "test://alice@")
        without = InputOptions("libvirt", ("g",), connection=uri)
        error = await refused(without)
        assert "wants a password" in error.message
        assert "-ip FILE" in (error.hint or "")
        wrong = InputOptions("libvirt", ("g",), connection=uri, password=Secret("wr0ng"))
        error = await refused(wrong)
        assert "authentication failed" in error.message
        assert "wr0ng" not in str(vars(error))
        right = InputOptions("libvirt", ("g",), connection=uri, password=Secret("s3cret"))
        await parse_input(right).check(quiet)


async def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    libvirt_connection.libvirt_module.cache_clear()
    try:
        with pytest.raises(DependencyError, match="bindings are not installed") as caught:
            await parse_input(InputOptions("libvirt", ("g",))).check(quiet)
        assert "python3-libvirt" in (caught.value.hint or "")
    finally:
        libvirt_connection.libvirt_module.cache_clear()


async def test_another_machine_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """virt-v2v warns too: the paths are looked for here."""

    async def no(*given: Any, **more: Any) -> Any:
        raise SourceError("no ssh here")

    monkeypatch.setattr(libvirt_connection, "_call", no)
    events: list[Event] = []
    given = InputOptions("libvirt", ("g",), connection="qemu+ssh://root:pw@far/system")
    with pytest.raises(SourceError, match="no ssh here"):
        await parse_input(given).check(Reporter(events.append, "t"))
    [warning] = [event.text or "" for event in events if event.type == "warning"]
    assert "is another machine" in warning
    assert "pw" not in warning
    assert not libvirt_connection.is_remote("qemu:///system")
    assert not libvirt_connection.is_remote(None)
    assert not libvirt_connection.is_remote("test:///default")


# The command line.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (InputOptions("libvirtxml", ("a", "b")), "takes one XML file"),
        (InputOptions("libvirt", ()), "takes one guest"),
        (InputOptions("libvirt", ("a",), transport="ssh"), "‘-it ssh’ has no meaning"),
        (InputOptions("libvirt", ("a",), format="foo"), "unknown format ‘-if foo’"),
        (InputOptions("libvirtxml", ("a",), options=(("x", None),)), "takes no -io x"),
        (InputOptions("libvirtxml", ("a",), options=(("overlay", "x"),)), "‘-io overlay=x’"),
    ],
)
def test_a_wrong_command_line(given: InputOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_input(given)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(os.urandom(64)), "is not well-formed XML"),
        (lambda path: path.write_bytes(b"<domain>" + bytes(5 * MIB)), "is too large"),
    ],
    ids=["absent", "directory", "noise", "a disk"],
)
async def test_a_file_that_is_no_xml(short_tmp: Path, make: Any, said: str) -> None:
    make(short_tmp / "x.xml")
    error = await refused(InputOptions("libvirtxml", (str(short_tmp / "x.xml"),)))
    assert said in error.message
    assert error.hint
