"""Streams between real pipes, programs and servers: every byte, in order."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from ctypes import c_int
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.servers import MIB, digest, fragmented, serve
from v2v_async.copy.ends import End
from v2v_async.copy.file import FileEnd
from v2v_async.copy.null import NullEnd, null_info
from v2v_async.copy.open_file import open_source, open_target
from v2v_async.copy.pipe import Stream, open_stream
from v2v_async.copy.stream import (
    StreamOptions,
    copy_between_streams,
    copy_from_stream,
    copy_to_stream,
)
from v2v_async.errors import (
    ConnectionLostError,
    CopyError,
    SizeMismatchError,
    SourceError,
    TargetError,
    UnsupportedError,
)
from v2v_async.handle import Completion, ExportInfo, Handle
from v2v_async.server import Servers, running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
ODD_SIZE = 37 * MIB + 1234
SMALL = StreamOptions(request_size=64 * 1024, requests=4)


class Landed:
    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, count: int) -> None:
        assert count >= 0
        self.bytes += count


@contextmanager
def connected(endpoint: str) -> Iterator[tuple[Handle, ExportInfo]]:
    handle = Handle()
    handle.connect(endpoint)
    try:
        yield handle, handle.info()
    finally:
        handle.close()


@asynccontextmanager
async def reading(fd: int) -> AsyncIterator[Stream]:
    stream = await open_stream(fd, is_writing=False)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def program(*argv: str, **options: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program whose pipes are the streams; it has ended, by itself, when this returns."""
    process = subprocess.Popen(argv, **options)  # type: ignore[call-overload]
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()


async def from_bytes(
    content: bytes,
    target: End,
    info: ExportInfo,
    options: StreamOptions = SMALL,
    *,
    grows: bool = False,
    pieces: int = 10_007,
) -> int:
    """Copy ``content`` through a pipe, written ``pieces`` bytes at a time."""
    read_fd, write_fd = os.pipe()

    def feed() -> None:
        try:
            for at in range(0, len(content), pieces):
                os.write(write_fd, content[at : at + pieces])
        except BrokenPipeError:
            pass
        finally:
            os.close(write_fd)

    feeder = threading.Thread(target=feed)
    landed = Landed()
    stream = await open_stream(read_fd, is_writing=False)
    os.close(read_fd)
    feeder.start()
    try:
        length = await copy_from_stream(stream, target, info, landed, options, grows=grows)
    finally:
        stream.close()
        await asyncio.to_thread(feeder.join)
    assert length == landed.bytes == len(content)
    return length


async def to_digest(
    source: End, info: ExportInfo, options: StreamOptions = SMALL
) -> tuple[str, int]:
    """Copy into sha256sum; return what it says, and what landed."""
    with program("sha256sum", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as summer:
        assert summer.stdin is not None
        assert summer.stdout is not None
        stream = await open_stream(summer.stdin.fileno(), is_writing=True)
        summer.stdin.close()
        landed = Landed()
        try:
            length = await copy_to_stream(source, info, stream, landed, options)
        finally:
            stream.close()
        assert length == landed.bytes
        return summer.stdout.read().decode().split()[0], length


# An end to a stream.


@pytest.mark.parametrize("extents", [True, False], ids=["extents", "noextents"])
@pytest.mark.parametrize("requests", [1, 16])
async def test_a_server_to_a_program(short_tmp: Path, extents: bool, requests: int) -> None:
    source = fragmented(short_tmp / "source", ODD_SIZE)
    options = StreamOptions(requests=requests, extents=extents)
    async with running_servers(V2VDir(short_tmp)) as servers:
        log = short_tmp / "stats"
        served = await serve(
            servers,
            "in1",
            short_tmp,
            "file",
            f"file={source}",
            f"statsfile={log}",
            filters=("stats",),
            read_only=True,
        )
        with connected(served.endpoint) as (handle, info):
            assert await to_digest(handle, info, options) == (digest(source), ODD_SIZE)
    read = next(line for line in log.read_text().splitlines() if line.startswith("read:"))
    # Holes are not read: most of this disk is one.
    assert ("37" in read.split("op/s")[0].split(",")[2]) is not extents, read


async def test_a_file_to_a_program(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source", ODD_SIZE)
    end, info = open_source(source)
    try:
        assert await to_digest(end, info) == (digest(source), ODD_SIZE)
    finally:
        end.close()


async def test_answers_out_of_order_are_written_in_order(short_tmp: Path) -> None:
    """Reads of the first halves of each MiB are slow."""
    script = short_tmp / "slow.sh"
    script.write_text(
        "case $1 in get_size) echo 8M;; thread_model) echo parallel;;\n"
        "pread) [ $(( $4 / 65536 % 3 )) = 0 ] && sleep 0.05\n"
        "  dd if=$(dirname $0)/disk skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none;;\n"
        "*) exit 2;; esac\n"
    )
    script.chmod(0o755)
    disk = short_tmp / "disk"
    disk.write_bytes(random.Random(5).randbytes(8 * MIB))
    async with running_servers(V2VDir(short_tmp)) as servers:
        served = await serve(servers, "in1", short_tmp, "sh", str(script), read_only=True)
        with connected(served.endpoint) as (handle, info):
            assert await to_digest(handle, info) == (digest(disk), 8 * MIB)


async def test_an_empty_source(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        served = await serve(servers, "in1", short_tmp, "memory", "0")
        with connected(served.endpoint) as (handle, info):
            assert await to_digest(handle, info) == (hashlib.sha256().hexdigest(), 0)


async def test_a_read_error_says_where(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        served = await serve(
            servers,
            "in1",
            short_tmp,
            "pattern",
            "4M",
            "error-pread=EIO",
            "error-pread-rate=1",
            filters=("error",),
        )
        with connected(served.endpoint) as (handle, info):
            with pytest.raises(CopyError, match="read of 65536 bytes failed: .*EIO") as caught:
                await to_digest(handle, info)
            assert caught.value.offset == 0
            assert not handle.is_lost


class Counting(Handle):
    """A connection that counts the reads that it has not answered."""

    in_flight = 0
    most = 0

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        def counted(error: Any) -> int:
            self.in_flight -= 1
            return done(error)

        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        super().read(view, offset, counted)


async def test_a_reader_that_leaves(short_tmp: Path) -> None:
    """What was on its way then is waited for: nbdkit 1.32 would abort."""
    async with running_servers(V2VDir(short_tmp)) as servers:
        served = await serve(
            servers, "in1", short_tmp, "pattern", "64M", "delay-read=100ms", filters=("delay",)
        )
        handle = Counting()
        handle.connect(served.endpoint)
        with program("head", "-c", "10", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as head:
            assert head.stdin is not None
            stream = await open_stream(head.stdin.fileno(), is_writing=True)
            head.stdin.close()
            try:
                with pytest.raises(TargetError, match="has gone before the end") as caught:
                    await copy_to_stream(handle, handle.info(), stream, Landed(), SMALL)
                assert caught.value.hint is not None
            finally:
                stream.close()
        assert handle.in_flight == 0
        assert handle.most == SMALL.requests
        handle.close()
        with connected(served.endpoint) as (again, _):
            assert again.read_now(8, 0) == bytes(8)


async def test_a_socket_takes_a_disk(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source", 5 * MIB)
    ours, theirs = socket.socketpair()
    received = hashlib.sha256()

    def receive() -> None:
        while piece := theirs.recv(65536):
            received.update(piece)

    receiver = threading.Thread(target=receive)
    receiver.start()
    end, info = open_source(source)
    stream = await open_stream(ours.fileno(), is_writing=True)
    ours.close()
    try:
        await copy_to_stream(end, info, stream, Landed(), SMALL)
    finally:
        stream.close()
        await asyncio.to_thread(receiver.join)
        end.close()
        theirs.close()
    assert received.hexdigest() == digest(source)


async def test_a_file_from_where_it_is(short_tmp: Path) -> None:
    """A header that was written before stays, where nbdcopy overwrites it."""
    path = short_tmp / "out"
    source = short_tmp / "source"
    source.write_bytes(b"disk" * 1000)
    end, info = open_source(source)
    with path.open("wb", buffering=0) as file:
        file.write(b"header")
        stream = await open_stream(file.fileno(), is_writing=True)
        await copy_to_stream(end, info, stream, Landed(), SMALL)
        stream.close()
    end.close()
    assert path.read_bytes() == b"header" + b"disk" * 1000


async def test_a_terminal_is_refused() -> None:
    ours, theirs = os.openpty()
    try:
        with pytest.raises(TargetError, match="terminal"):
            await open_stream(theirs, is_writing=True)
    finally:
        os.close(ours)
        os.close(theirs)


# A stream to an end.


@pytest.mark.parametrize("zero", [True, False], ids=["zero", "nozero"])
@pytest.mark.parametrize("is_known_zero", [True, False], ids=["empty", "dirty"])
@pytest.mark.parametrize("allocated", [True, False], ids=["allocated", "sparse"])
async def test_a_program_to_a_server(
    short_tmp: Path, zero: bool, is_known_zero: bool, allocated: bool
) -> None:
    source = fragmented(short_tmp / "source", ODD_SIZE)
    path = short_tmp / "target"
    path.write_bytes(b"" if is_known_zero else b"old" * (ODD_SIZE // 3 + 1))
    os.truncate(path, ODD_SIZE)
    options = StreamOptions(is_known_zero=is_known_zero, allocated=allocated)
    filters = () if zero else ("nozero",)
    landed = Landed()
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(servers, "out1", short_tmp, "file", f"file={path}", filters=filters)
        with connected(out.endpoint) as (handle, info):
            with program("cat", str(source), stdout=subprocess.PIPE) as cat:
                assert cat.stdout is not None
                async with reading(cat.stdout.fileno()) as stream:
                    length = await copy_from_stream(stream, handle, info, landed, options)
    assert length == landed.bytes == ODD_SIZE
    assert digest(path) == digest(source)
    took = path.stat().st_blocks * 512
    if allocated:
        assert took >= ODD_SIZE - 4096
    elif zero:
        assert took < ODD_SIZE // 2


@pytest.mark.parametrize("minimum", [512, 4096, 65536])
async def test_the_end_is_padded_to_a_block(short_tmp: Path, minimum: int) -> None:
    """A server that refuses parts of blocks gets none, whatever the stream's pieces are."""
    content = random.Random(3).randbytes(300_000) + bytes(100_000) + b"tail"
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(
            servers,
            "out1",
            short_tmp,
            "memory",
            "1M",
            f"blocksize-minimum={minimum}",
            f"blocksize-preferred={max(minimum, 4096)}",
            "blocksize-error-policy=error",
            filters=("blocksize-policy",),
        )
        with connected(out.endpoint) as (handle, info):
            assert info.minimum_block == minimum
            handle.write_now(memoryview(b"o" * MIB), 0)
            await from_bytes(content, handle, info)
            padded = -(-len(content) // minimum) * minimum
            got = handle.read_now(MIB, 0)
            assert got == content.ljust(padded, b"\0") + b"o" * (MIB - padded)


@pytest.mark.parametrize("more", [1, 5 * MIB])
async def test_a_longer_stream_says_what_fits(short_tmp: Path, more: int) -> None:
    content = random.Random(4).randbytes(MIB + more)
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(servers, "out1", short_tmp, "memory", "1M")
        with connected(out.endpoint) as (handle, info):
            with pytest.raises(SizeMismatchError, match="only 1048576 bytes fit"):
                await from_bytes(content, handle, info)
            assert not handle.is_lost
        assert out.process.returncode is None


async def test_a_stream_that_just_fits_and_a_shorter_one(short_tmp: Path) -> None:
    content = random.Random(4).randbytes(MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(servers, "out1", short_tmp, "memory", "1M")
        with connected(out.endpoint) as (handle, info):
            await from_bytes(content, handle, info)
            await from_bytes(b"short", handle, info)
            await from_bytes(b"", handle, info)
            assert handle.read_now(MIB, 0) == b"short" + content[5:]


async def test_a_write_error_says_where(short_tmp: Path) -> None:
    async with running_servers(V2VDir(short_tmp)) as servers:
        out = await serve(
            servers,
            "out1",
            short_tmp,
            "memory",
            "1M",
            "error-pwrite=ENOSPC",
            "error-pwrite-rate=1",
            filters=("error",),
        )
        with connected(out.endpoint) as (handle, info):
            with pytest.raises(CopyError, match="write of .*ENOSPC") as caught:
                await from_bytes(b"x" * 200_000, handle, info)
            assert caught.value.offset is not None
            assert not handle.is_lost


class WithoutZeroes(FileEnd):
    """An end that finds out late that it can't zero."""

    raises = False
    asked = 0

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        self.asked += 1
        if self.raises:
            raise UnsupportedError("no zeroes here")
        done(c_int(errno.EOPNOTSUPP))


@pytest.mark.parametrize("raises", [False, True], ids=["answered", "raised"])
async def test_zeroes_that_are_refused_are_written(raises: bool) -> None:
    end = WithoutZeroes(os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR, 0o600), "a file")
    end.raises = raises
    try:
        end.write_now(memoryview(b"o" * MIB), 0)
        content = b"a" * 8192 + bytes(300_000) + b"b" * 5000
        await from_bytes(content, end, end.info())
        assert end.read_now(len(content), 0) == content
        assert end.asked == 1
    finally:
        end.close()


async def test_a_server_that_dies(short_tmp: Path) -> None:
    read_fd, write_fd = os.pipe()
    pid_file, path = short_tmp / "pid", short_tmp / "out1"
    # Goes to the background when it is ready.
    subprocess.run(["nbdkit", "-U", path, "-P", pid_file, "memory", "16M"], check=True)
    try:
        with connected(str(path)) as (handle, info):
            async with reading(read_fd) as stream:
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
                os.write(write_fd, b"x" * 65536)
                with pytest.raises(ConnectionLostError):
                    await copy_from_stream(stream, handle, info, Landed(), SMALL)
    finally:
        os.close(read_fd)
        os.close(write_fd)


@pytest.mark.parametrize("is_known_zero", [True, False])
async def test_a_stream_to_a_file_that_grows(short_tmp: Path, is_known_zero: bool) -> None:
    path = short_tmp / "target"
    path.write_bytes(b"longer than what comes" * 100_000)
    content = random.Random(1).randbytes(100_000) + bytes(500_000)
    end, info, is_zero = open_target(path, None)
    assert is_zero
    options = StreamOptions(is_known_zero=is_known_zero, request_size=65536)
    try:
        await from_bytes(content, end, info, options, grows=True)
    finally:
        end.close()
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 < 200_000


async def test_a_stream_to_null() -> None:
    await from_bytes(b"x" * 1_000_000, NullEnd(), null_info(0), grows=True)


async def test_a_named_pipe(short_tmp: Path) -> None:
    fifo = short_tmp / "fifo"
    os.mkfifo(fifo)
    source = fragmented(short_tmp / "source", 3 * MIB)
    with program("cp", str(source), str(fifo)):
        stream = await open_stream(fifo, is_writing=False)
        end, info, _ = open_target(short_tmp / "target", None)
        try:
            await copy_from_stream(stream, end, info, Landed(), SMALL, grows=True)
        finally:
            stream.close()
            end.close()
    assert digest(short_tmp / "target") == digest(source)


async def test_a_named_pipe_is_written_when_somebody_reads(short_tmp: Path) -> None:
    fifo = short_tmp / "fifo"
    os.mkfifo(fifo)
    source, info = open_source(fragmented(short_tmp / "source", 3 * MIB))
    with anyio.move_on_after(0.2) as scope:
        await open_stream(fifo, is_writing=True)
    assert scope.cancelled_caught
    with program("cp", str(fifo), str(short_tmp / "target")):
        stream = await open_stream(fifo, is_writing=True)
        try:
            await copy_to_stream(source, info, stream, Landed(), SMALL)
        finally:
            stream.close()
            source.close()
    assert digest(short_tmp / "target") == digest(short_tmp / "source")


async def test_streams_that_can_not_be_opened(short_tmp: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        await open_stream(short_tmp / "nowhere", is_writing=False)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(short_tmp / "socket"))
    try:
        with pytest.raises(TargetError, match="can't open"):
            await open_stream(short_tmp / "socket", is_writing=True)
    finally:
        listening.close()


async def test_from_program_to_program(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source", ODD_SIZE)
    landed = Landed()
    with program("cat", str(source), stdout=subprocess.PIPE) as cat:
        with program("sha256sum", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as summer:
            assert cat.stdout is not None
            assert summer.stdin is not None
            assert summer.stdout is not None
            target = await open_stream(summer.stdin.fileno(), is_writing=True)
            summer.stdin.close()
            async with reading(cat.stdout.fileno()) as stream:
                length = await copy_between_streams(stream, target, landed)
            target.close()
            assert summer.stdout.read().decode().split()[0] == digest(source)
    assert length == landed.bytes == ODD_SIZE


@given(
    runs=st.lists(st.tuples(st.integers(1, 40_000), st.booleans()), max_size=12),
    pieces=st.sampled_from([1000, 4096, 65_537]),
    sparse=st.sampled_from([0, 512, 4096, 65536]),
    request_size=st.sampled_from([512, 10_000, 65536]),
    is_known_zero=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_stream_arrives(
    runs: list[tuple[int, bool]], pieces: int, sparse: int, request_size: int, is_known_zero: bool
) -> None:
    content = b"".join(b"\0" * n if is_zero else b"d" * n for n, is_zero in runs)
    old = b"" if is_known_zero else b"old" * 200_000
    options = StreamOptions(
        request_size=request_size, requests=3, sparse=sparse, is_known_zero=is_known_zero
    )

    async def copy() -> bytes:
        fd = os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
        os.pwrite(fd, old, 0)
        os.ftruncate(fd, 600_000)
        end = FileEnd(fd, "a file")
        try:
            await from_bytes(content, end, end.info(), options, pieces=pieces)
            return bytes(end.read_now(600_000, 0))
        finally:
            end.close()

    assert asyncio.run(copy()) == content + old.ljust(600_000, b"\0")[len(content) :]


# Stopping.


async def hold(servers: Servers, folder: Path) -> str:
    served = await serve(servers, "in1", folder, "pattern", "64M")
    return served.endpoint


async def test_cancelling_while_the_stream_keeps_still(short_tmp: Path) -> None:
    read_fd, write_fd = os.pipe()
    arrived = anyio.Event()
    token = asyncio.get_running_loop()

    def landed(count: int) -> None:
        token.call_soon_threadsafe(arrived.set)

    try:
        async with running_servers(V2VDir(short_tmp)) as servers:
            with connected(await hold_target(servers, short_tmp)) as (handle, info):
                async with reading(read_fd) as stream:
                    os.write(write_fd, b"x" * 65536)
                    with anyio.fail_after(30):
                        async with anyio.create_task_group() as tasks:
                            tasks.start_soon(copy_from_stream, stream, handle, info, landed, SMALL)
                            await arrived.wait()
                            tasks.cancel_scope.cancel()
                assert not handle.is_lost
                assert handle.read_now(5, 0) == b"xxxxx"
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def hold_target(servers: Servers, folder: Path) -> str:
    return (await serve(servers, "out1", folder, "memory", "64M")).endpoint


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_cancelling_while_nobody_reads(short_tmp: Path, kind: str) -> None:
    ours, theirs = (end.detach() for end in socket.socketpair())
    if kind == "pipe":
        os.close(ours)
        os.close(theirs)
        theirs, ours = os.pipe()
    arrived = anyio.Event()
    loop = asyncio.get_running_loop()

    def landed(count: int) -> None:
        loop.call_soon_threadsafe(arrived.set)

    stream = await open_stream(ours, is_writing=True)
    try:
        async with running_servers(V2VDir(short_tmp)) as servers:
            with connected(await hold(servers, short_tmp)) as (handle, info):
                with anyio.fail_after(30):
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(copy_to_stream, handle, info, stream, landed, SMALL)
                        await arrived.wait()
                        tasks.cancel_scope.cancel()
                assert not handle.is_lost
    finally:
        stream.close()
        os.close(ours)
        os.close(theirs)


class Hung(NullEnd):
    """A server that never answers."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.asked = threading.Event()

    def fileno(self) -> int:
        return self.fd

    def direction(self) -> int:
        return 1

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        self.asked.set()

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        self.asked.set()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_cancelling_while_a_server_hangs(side: str) -> None:
    read_fd, write_fd = os.pipe()
    ours, theirs = socket.socketpair()
    hung = Hung(ours.fileno())
    is_source = side == "source"
    stream = await open_stream(write_fd if is_source else read_fd, is_writing=is_source)
    os.write(write_fd, b"x")
    os.close(write_fd)
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                if is_source:
                    tasks.start_soon(copy_to_stream, hung, null_info(5), stream, Landed())
                else:
                    tasks.start_soon(copy_from_stream, stream, hung, null_info(5), Landed())
                await asyncio.to_thread(hung.asked.wait)
                tasks.cancel_scope.cancel()
    finally:
        stream.close()
        os.close(read_fd)
        ours.close()
        theirs.close()


async def test_cancelling_before_anything(short_tmp: Path) -> None:
    read_fd, write_fd = os.pipe()
    try:
        async with reading(read_fd) as stream:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await copy_from_stream(stream, NullEnd(), null_info(0), Landed(), grows=True)
            assert scope.cancelled_caught
    finally:
        os.close(read_fd)
        os.close(write_fd)


async def test_a_pipe_that_can_not_be_opened_anew_does_not_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without /proc: written by small pieces, as much as a pipe that polls as writable takes."""
    read_fd, write_fd = os.pipe()
    opened: Callable[..., int] = os.open

    def refuse(path: object, flags: int, *rest: int) -> int:
        if str(path).startswith("/proc/self/fd/"):
            raise PermissionError(errno.EACCES, "no")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    stream = await open_stream(write_fd, is_writing=True)
    try:
        assert stream.write_some(memoryview(bytes(MIB))) == 4096
        assert os.get_blocking(stream.fd)
    finally:
        stream.close()
        os.close(read_fd)
        os.close(write_fd)


async def test_our_flags_are_not_seen_by_others() -> None:
    read_fd, write_fd = os.pipe()
    stream = await open_stream(write_fd, is_writing=True)
    try:
        assert not os.get_blocking(stream.fd)
        assert os.get_blocking(write_fd)
    finally:
        stream.close()
        os.close(read_fd)
        os.close(write_fd)
