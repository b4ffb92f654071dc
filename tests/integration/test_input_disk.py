"""Every kind of source behind its overlay: served whole, written to, and never changed."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.conftest import require
from tests.integration.servers import MIB, digest, fragmented, serve
from tests.waiting import until
from v2v_async import nbdkit
from v2v_async.connection import connected
from v2v_async.errors import V2VError
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.process import ServerCommand
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
quiet = Reporter(lambda event: None, "t")
SIZE = 16 * MIB


@contextlib.asynccontextmanager
async def served(folder: Path, options: InputOptions) -> AsyncIterator[tuple[V2VDir, SourceGuest]]:
    (folder / "v").mkdir()
    v2vdir = V2VDir(folder / "v")
    v2vdir.adopt()
    source = parse_input(options)
    await source.check(quiet)
    async with running_servers(v2vdir) as servers:
        yield v2vdir, await source.setup(v2vdir, servers, quiet)


async def content(endpoint: str) -> bytes:
    async with connected(endpoint) as connection:
        read = connection.handle.read_now
        parts = [
            await anyio.to_thread.run_sync(read, min(MIB, connection.info.size - at), at)
            for at in range(0, connection.info.size, MIB)
        ]
    return b"".join(parts)


async def write(endpoint: str) -> None:
    """Write and flush, as a conversion does."""
    async with connected(endpoint) as connection:
        done: list[int] = []

        def note(error: object) -> int:
            done.append(error.value)  # type: ignore[attr-defined]
            return 1

        connection.handle.write(memoryview(b"changed!" * 8192), 65536, note)
        while not done:
            connection.handle._nbd.poll(-1)
        assert done == [0]
        connection.handle.flush_now()


def image(folder: Path, image_format: str) -> tuple[Path, bytes]:
    """Return a disk of the format and what a guest sees in it."""
    raw = fragmented(folder / "raw.img", SIZE)
    if image_format == "raw":
        return raw, raw.read_bytes()
    path = folder / f"disk.{image_format}"
    options = ["-o", "force_size=on"] if image_format == "vpc" else []
    convert = ["qemu-img", "convert", "-f", "raw", "-O", image_format, *options]
    subprocess.run([*convert, str(raw), str(path)], check=True)
    return path, raw.read_bytes()


@pytest.mark.parametrize("given", [True, False], ids=["-if", "found out"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"])
async def test_each_format(short_tmp: Path, image_format: str, given: bool) -> None:
    path, expected = image(short_tmp, image_format)
    before = (digest(path), path.stat().st_mtime_ns)
    options = InputOptions("disk", (str(path),), format=image_format if given else None)
    async with served(short_tmp, options) as (v2vdir, guest):
        assert guest.disks[0].size == SIZE
        assert guest.disks[0].format == image_format
        endpoint = str(v2vdir.source_socket(1))
        assert await content(endpoint) == expected
        await write(endpoint)
        changed = await content(endpoint)
        assert changed[65536:65544] == b"changed!"
        assert changed[:65536] == expected[:65536]
    assert (digest(path), path.stat().st_mtime_ns) == before


async def test_a_chain_holds_what_its_files_hold(short_tmp: Path) -> None:
    """Of a snapshot's image on top the disk holds little, and the guest all that is below."""
    base, _ = image(short_tmp, "qcow2")
    top = short_tmp / "top.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(top)]
    subprocess.run(argv, check=True)
    source = parse_input(InputOptions("disk", (str(top),)))
    await source.check(quiet)
    [disk] = (await source.describe()).disks
    assert disk.files == [str(top), str(base)]
    held = [path.stat().st_blocks * 512 for path in (top, base)]
    assert disk.allocated == min(sum(held), SIZE)
    assert held[1] > 2 * held[0]


async def test_a_qcow2_overlay_outlives_its_server_and_knows_what_changed(short_tmp: Path) -> None:
    path, expected = image(short_tmp, "raw")
    options = InputOptions("disk", (str(path),), options=(("overlay", "qcow2"),))
    async with served(short_tmp, options) as (v2vdir, _):
        await write(str(v2vdir.source_socket(1)))
    overlay = v2vdir.path / "overlay-1.qcow2"
    mapped = subprocess.run(
        ["qemu-img", "map", "--output=json", "-U", str(overlay)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"start": 65536, "length": 65536, "depth": 0' in mapped
    assert path.read_bytes() == expected


@pytest.mark.parametrize("scheme", ["nbd+unix", "nbd"])
async def test_an_nbd_export(short_tmp: Path, scheme: str) -> None:
    path, expected = image(short_tmp, "raw")
    before = digest(path)
    async with running_servers(V2VDir(short_tmp)) as servers:
        await serve(servers, "far", short_tmp, "file", f"file={path}")
        async with contextlib.AsyncExitStack() as stack:
            if scheme == "nbd":
                port = await stack.enter_async_context(tcp_to(short_tmp / "far"))
                uri = f"nbd://127.0.0.1:{port}/disk"
            else:
                uri = f"nbd+unix:///disk?socket={short_tmp}/far"
            async with served(short_tmp, InputOptions("disk", (uri,))) as (v2vdir, guest):
                assert guest.name == "disk"
                endpoint = str(v2vdir.source_socket(1))
                assert await content(endpoint) == expected
                await write(endpoint)
    assert digest(path) == before


@contextlib.asynccontextmanager
async def tcp_to(socket: Path) -> AsyncIterator[int]:
    """Forward a loopback port to a Unix socket."""

    async def forward(source: anyio.abc.SocketStream, sink: anyio.abc.SocketStream) -> None:
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            async for chunk in source:
                await sink.send(chunk)
            await sink.send_eof()

    async def handle(client: anyio.abc.SocketStream) -> None:
        async with client, await anyio.connect_unix(str(socket)) as server:
            async with anyio.create_task_group() as both:
                both.start_soon(forward, client, server)
                both.start_soon(forward, server, client)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, handle)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        group.cancel_scope.cancel()


async def test_an_nbd_export_with_tls(short_tmp: Path) -> None:
    """nbds:// with a certificate that is checked; and one that is not ours is refused."""
    require("certtool")
    path, expected = image(short_tmp, "raw")
    pki, other = short_tmp / "pki", short_tmp / "other"
    for folder in (pki, other):
        make_certificates(folder)
    port = free_port()
    log = short_tmp / "tls.log"
    argv = ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require"]
    argv += [f"--tls-certificates={pki}", "file", str(path)]
    with log.open("wb") as output:
        server = subprocess.Popen(argv, stderr=output)
    try:
        await listening(port)
        uri = f"nbds://localhost:{port}/?tls-certificates={pki}"
        async with served(short_tmp, InputOptions("disk", (uri,))) as (v2vdir, guest):
            assert guest.disks[0].size == SIZE
            assert await content(str(v2vdir.source_socket(1))) == expected
        wrong = f"nbds://localhost:{port}/?tls-certificates={other}"
        with pytest.raises(V2VError, match="can't connect"):
            await parse_input(InputOptions("disk", (wrong,))).check(quiet)
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def listening(port: int) -> None:
    def is_open() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    await until(is_open, f"port {port} is open")


def make_certificates(folder: Path) -> None:
    """An authority, a server's certificate for localhost, and a client's: nbdkit's names."""
    folder.mkdir()

    def certtool(*argv: str) -> None:
        subprocess.run(["certtool", *argv], check=True, capture_output=True, cwd=folder)

    def key(name: str) -> None:
        certtool("--generate-privkey", "--ecc", "--outfile", name)

    (folder / "ca.info").write_text("cn = test\nca\ncert_signing_key\n")
    key("ca-key.pem")
    certtool(
        *("--generate-self-signed", "--load-privkey", "ca-key.pem"),
        *("--template", "ca.info", "--outfile", "ca-cert.pem"),
    )
    for who, use in (("server", "tls_www_server"), ("client", "tls_www_client")):
        (folder / f"{who}.info").write_text(
            f"cn = localhost\ndns_name = localhost\n{use}\nencryption_key\nsigning_key\n"
        )
        key(f"{who}-key.pem")
        certtool(
            *("--generate-certificate", "--load-ca-certificate", "ca-cert.pem"),
            *("--load-ca-privkey", "ca-key.pem", "--load-privkey", f"{who}-key.pem"),
            *("--template", f"{who}.info", "--outfile", f"{who}-cert.pem"),
        )


@pytest.mark.parametrize(
    ("uri", "parameters"),
    [
        ("nbd://h:1/x", ["uri=nbd://h:1/x"]),
        ("nbd+unix:///x?socket=/a", ["uri=nbd+unix:///x?socket=/a"]),
        ("nbds://h/?tls-certificates=/a%20b", ["uri=nbds://h/", "tls-certificates=/a b"]),
        (
            "nbds+unix://u@/x?socket=/s&tls-psk-file=/k",
            ["uri=nbds+unix://u@/x?socket=/s", "tls-psk=/k"],
        ),
    ],
)
def test_parameters_of_the_nbd_plugin(uri: str, parameters: list[str]) -> None:
    assert nbdkit.uri_parameters(uri) == parameters


async def test_the_servers_come_back_in_order_and_the_first_failure_is_named(
    short_tmp: Path,
) -> None:
    """The second of three disks vanishes between the check and the start of its server."""
    paths = [fragmented(short_tmp / f"{n}.img", MIB, seed=n) for n in range(3)]
    (short_tmp / "v").mkdir()
    v2vdir = V2VDir(short_tmp / "v")
    v2vdir.adopt()
    source = parse_input(InputOptions("disk", tuple(map(str, paths))))
    await source.check(quiet)
    paths[1].unlink()
    with pytest.raises(V2VError) as caught:
        async with running_servers(v2vdir) as servers:
            await source.setup(v2vdir, servers, quiet)
    assert caught.value.disk == 2
    assert caught.value.log == v2vdir.log("input", 2)
    assert v2vdir.state.processes == []


async def test_a_command_is_shown_without_its_secrets(short_tmp: Path) -> None:
    secret = ServerCommand(
        "nbdkit",
        ("nbdkit", "-f", "-U", str(short_tmp / "s"), "curl", "password=hunter2", "url=file:///x"),
        short_tmp / "s",
    )
    log = short_tmp / "log"
    with pytest.raises(V2VError) as caught:
        async with running_servers(V2VDir(short_tmp)) as servers:
            await servers.start("in1", secret, log=log)
    assert "hunter2" not in log.read_text()
    assert "hunter2" not in str(vars(caught.value))
