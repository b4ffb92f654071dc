from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import require
from v2v_async.copy import file as file_module
from v2v_async.copy.ends import End
from v2v_async.copy.file import MAX_ENTRIES, FileEnd
from v2v_async.copy.open_file import local_kind, open_source, open_target
from v2v_async.errors import (
    RequestError,
    SizeMismatchError,
    SourceError,
    TargetError,
)
from v2v_async.extent import from_reply

KIB = 1024
MIB = 1024 * KIB
# ext4 or overlay as a rule, and tmpfs, which punches holes but has no ZERO_RANGE.
PLACES = [path for path in ("/var/tmp", "/dev/shm") if os.path.isdir(path)]


class Noted:
    """What a completion was told."""

    def __init__(self) -> None:
        self.codes: list[int] = []

    def __call__(self, error: Any) -> int:
        self.codes.append(error.value)
        return 1

    @property
    def code(self) -> int:
        assert len(self.codes) == 1, "a request is answered once"
        return self.codes[0]


@pytest.fixture
def made() -> Iterator[Callable[..., FileEnd]]:
    """Make ends on unnamed files, closed at the end of the test."""
    ends: list[FileEnd] = []

    def make(content: bytes = b"", place: str = "/var/tmp", flags: int = os.O_RDWR) -> FileEnd:
        fd = os.open(place, os.O_TMPFILE | flags | os.O_CLOEXEC, 0o600)
        if content:
            os.pwrite(fd, content, 0)
        ends.append(FileEnd(fd, "a file"))
        return ends[-1]

    yield make
    for end in ends:
        end.close()


def content(end: FileEnd) -> bytes:
    return os.pread(end.fd, end.size(), 0)


def refuse(*modes: int) -> Callable[[int, int, int, int], None]:
    """Return a fallocate without these modes (without any: all of them are refused)."""
    from v2v_async.linux import fallocate

    def call(fd: int, mode: int, offset: int, length: int) -> None:
        if not modes or mode in modes:
            raise OSError(errno.EOPNOTSUPP, "not here")
        fallocate(fd, mode, offset, length)

    return call


def test_requests_are_done_when_their_call_returns(made: Callable[..., FileEnd]) -> None:
    end: End = made(b"0123456789")
    noted = Noted()
    view = memoryview(bytearray(4))
    end.read(view, 3, noted)
    assert noted.code == 0
    assert bytes(view) == b"3456"
    noted = Noted()
    end.write(memoryview(b"ab"), 9, noted)
    assert noted.code == 0
    noted = Noted()
    end.flush(noted)
    assert noted.code == 0
    assert end.fileno() == -1


def test_short_counts_are_continued(
    made: Callable[..., FileEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = made(bytes(range(200)))
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: pwrite(fd, view[:3], at))
    assert end.read_now(100, 50) == bytes(range(50, 150))
    end.write_now(memoryview(b"x" * 50), 20)
    assert end.read_now(200, 0) == bytes(range(20)) + b"x" * 50 + bytes(range(70, 200))


def test_a_file_that_shrank_is_an_error(made: Callable[..., FileEnd]) -> None:
    end = made(b"x" * 10_000)
    end.set_size(5000)
    noted = Noted()
    end.read(memoryview(bytearray(6000)), 0, noted)
    assert noted.code == errno.EIO
    # What is missing is not a hole that would be copied as zeroes: it is to be read, and fails.
    end.set_size(4096)
    assert sum(length for length, flags in end.extents_now(10_000, 0) if flags) <= 4096
    told = list(from_reply(0, 10_000, end.extents_now(10_000, 0)))
    assert not told[-1].is_zero
    assert end.extents_now(2000, 8000) == [(2000, 0)]
    with pytest.raises(RequestError, match="Input/output error .EIO., ‘a file’") as caught:
        end.read_now(10, 9000)
    assert caught.value.offset == 9000


def test_errors_are_given_not_raised(made: Callable[..., FileEnd]) -> None:
    writer = made(flags=os.O_WRONLY)
    noted = Noted()
    writer.read(memoryview(bytearray(5)), 0, noted)
    assert noted.code == errno.EBADF
    noted = Noted()
    writer.close()
    writer.write(memoryview(b"x"), 0, noted)
    assert noted.code == errno.EBADF
    assert writer.is_lost
    noted = Noted()
    writer.zero(1, 0, noted)
    assert noted.code == errno.EBADF
    noted = Noted()
    writer.block_status(1, 0, lambda _: pytest.fail("told"), noted)
    assert noted.code == errno.EBADF


def test_a_full_disk_is_told() -> None:
    full = FileEnd(os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC), "/dev/full")
    try:
        noted = Noted()
        full.write(memoryview(b"x"), 0, noted)
        assert noted.code == errno.ENOSPC
    finally:
        full.close()


def test_what_has_nothing_to_flush_is_flushed() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    end = FileEnd(write_fd, "a pipe")
    try:
        end.flush_now()
    finally:
        end.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("allocate", [False, True], ids=["sparse", "allocated"])
@pytest.mark.parametrize("without", ["nothing", "punch", "range", "both", "all"])
def test_zeroes_in_every_way(
    made: Callable[..., FileEnd],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    allocate: bool,
    without: str,
) -> None:
    modes = {"punch": (3,), "range": (16,), "both": (3, 16), "all": ()}
    if without != "nothing":
        monkeypatch.setattr(file_module, "fallocate", refuse(*modes[without]))
    end = made(b"x" * MIB, place)
    before = os.fstat(end.fd).st_blocks
    for offset, length in ((64 * KIB, 512 * KIB), (700_001, 33_333), (MIB - 5, 5)):
        noted = Noted()
        end.zero(length, offset, noted, allocate=allocate)
        assert noted.code == 0
    expected = bytearray(b"x" * MIB)
    for offset, length in ((64 * KIB, 512 * KIB), (700_001, 33_333), (MIB - 5, 5)):
        expected[offset : offset + length] = bytes(length)
    assert content(end) == expected
    took = os.fstat(end.fd).st_blocks
    if allocate or without in ("both", "all"):
        assert took >= before
    elif without == "nothing":
        assert took <= before - 512 * KIB // 512
    end.zero_now(0, 0)


@pytest.mark.parametrize("allocate", [False, True])
def test_only_fast_is_never_written(
    made: Callable[..., FileEnd], monkeypatch: pytest.MonkeyPatch, allocate: bool
) -> None:
    end = made(b"x" * 8192)
    noted = Noted()
    end.zero(4096, 0, noted, only_fast=True)
    assert noted.code == 0
    monkeypatch.setattr(file_module, "fallocate", refuse())
    noted = Noted()
    end.zero(4096, 4096, noted, allocate=allocate, only_fast=True)
    assert noted.code == errno.ENOTSUP
    assert content(end) == bytes(4096) + b"x" * 4096


def test_zeroes_of_a_full_disk_are_not_written_instead(
    made: Callable[..., FileEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    end = made(b"x" * 8192)
    monkeypatch.setattr(file_module, "fallocate", full)
    with pytest.raises(RequestError) as caught:
        end.zero_now(4096, 0, allocate=True)
    assert caught.value.errno == errno.ENOSPC


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "zero", "allocate"]),
        st.integers(0, 300 * KIB),
        st.integers(1, 100 * KIB),
    ),
    max_size=12,
)


@pytest.mark.parametrize("place", PLACES)
@given(operations=OPERATIONS, asked=st.tuples(st.integers(0, 400_000), st.integers(1, 400_000)))
@settings(max_examples=60, deadline=None)
def test_extents_tile_and_never_lie(
    place: str, operations: list[tuple[str, int, int]], asked: tuple[int, int]
) -> None:
    size = 400 * KIB
    end = FileEnd(os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "a file")
    try:
        end.set_size(size)
        model = bytearray(size)
        for op, offset, length in operations:
            if op == "write":
                end.write_now(memoryview(b"w" * length), offset)
            else:
                end.zero_now(length, offset, allocate=op == "allocate")
            model[offset : offset + length] = (b"w" if op == "write" else b"\0") * length
        assert content(end) == model
        offset = min(asked[0], size - 1)
        length = min(asked[1], size - offset)
        entries = end.extents_now(length, offset)
        assert sum(length for length, _ in entries) == length
        position = offset
        for part, flags in entries:
            assert part > 0
            assert flags in (0, 3)
            if flags:
                assert not any(model[position : position + part])
            position += part
        if not operations:
            assert entries == [(length, 3)]
    finally:
        end.close()


def test_a_reply_is_bounded(made: Callable[..., FileEnd], monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_ENTRIES >= 1000
    monkeypatch.setattr(file_module, "MAX_ENTRIES", 5)
    end = made()
    end.set_size(64 * MIB)
    for at in range(20):
        os.pwrite(end.fd, b"x", at * MIB)
    entries = end.extents_now(64 * MIB, 0)
    assert len(entries) == 5
    assert [flags for _, flags in entries] == [0, 3, 0, 3, 0]
    # The next question goes on where it ended.
    told = sum(length for length, _ in entries)
    assert end.extents_now(64 * MIB - told, told)[0][1] == 3


def test_a_file_system_that_can_not_tell_has_only_data(
    made: Callable[..., FileEnd], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "no such thing")

    monkeypatch.setattr(os, "lseek", lseek)
    end = made()
    end.set_size(MIB)
    assert not end.info().has_extents
    assert end.extents_now(MIB, 0) == [(MIB, 0)]


def test_another_end_on_the_same_file(made: Callable[..., FileEnd]) -> None:
    first = made(b"x" * 100)
    other = first.another()
    try:
        other.write_now(memoryview(b"yy"), 50)
        assert first.read_now(3, 49) == b"xyy"
        first.close()
        assert other.read_now(1, 50) == b"y"
        assert not os.get_inheritable(other.fd)
    finally:
        other.close()


# Opening.


def test_a_source_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 12345)
    end, info = open_source(path)
    try:
        assert (info.size, info.is_read_only, info.minimum_block) == (12345, True, 1)
        assert info.has_extents
        assert info.can_multi_conn
    finally:
        end.close()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file") as caught:
        open_source(tmp_path / "nowhere")
    assert caught.value.hint is not None
    with pytest.raises(SourceError, match="is a directory"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="neither a regular file"):
        open_source("/dev/null")


def test_a_given_descriptor_stays_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    try:
        end, _ = open_source(fd)
        end.close()
        assert os.pread(fd, 3, 0) == b"abc"
        with pytest.raises(TargetError, match="opened only for reading"):
            open_target(fd, 10)
        assert path.read_bytes() == b"abc"
    finally:
        os.close(fd)
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(SourceError, match="opened only for writing"):
            open_source(fd)
    finally:
        os.close(fd)


def test_a_new_target_is_made_and_known_to_be_zero(tmp_path: Path) -> None:
    end, info, is_zero = open_target(tmp_path / "new", 5 * MIB)
    try:
        assert is_zero
        assert info.size == 5 * MIB
        assert not info.is_read_only
        status = os.fstat(end.fd)
        assert status.st_blocks == 0
        assert stat.S_IMODE(status.st_mode) & ~0o644 == 0
    finally:
        end.close()


@pytest.mark.parametrize("keep", [False, True], ids=["emptied", "kept"])
def test_an_existing_target(tmp_path: Path, keep: bool) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old" * 1000)
    end, _, is_zero = open_target(path, 5000, keep=keep)
    end.close()
    assert path.stat().st_size == 5000
    assert is_zero is not keep
    assert path.read_bytes() == (b"old" * 1000 if keep else b"").ljust(5000, b"\0")


def test_a_target_of_unknown_size_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"old")
    end, info, is_zero = open_target(path, None)
    end.close()
    assert (info.size, is_zero, path.stat().st_size) == (0, True, 0)


def test_source_and_target_must_differ(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(path)
    source, _ = open_source(path)
    try:
        with pytest.raises(TargetError, match="the same file"):
            open_target(tmp_path / "link", 8, source=source)
    finally:
        source.close()
    assert path.read_bytes() == b"precious"


def test_targets_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="Is a directory"):
        open_target(tmp_path, 5)
    with pytest.raises(TargetError, match="No such file") as caught:
        open_target(tmp_path / "no" / "disk", 5)
    assert caught.value.hint == "make its directory first"
    with pytest.raises(TargetError, match="neither a regular file"):
        open_target("/dev/null", 5)
    huge = tmp_path / "huge"
    with pytest.raises(TargetError, match="can't make"):
        open_target(huge, (1 << 63) - 1)
    assert not huge.exists()


def test_what_is_a_file_and_what_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    assert local_kind(path) == "file"
    path.write_bytes(b"0123456789")
    assert local_kind(path) == "file"
    assert local_kind(tmp_path) == "file"
    os.mkfifo(tmp_path / "fifo")
    assert local_kind(tmp_path / "fifo") == "stream"
    assert local_kind("/dev/null") == "stream"
    with path.open("rb", buffering=0) as file:
        assert local_kind(file.fileno()) == "file"
        file.read(3)
        assert local_kind(file.fileno()) == "stream"
    with path.open("ab", buffering=0) as file:
        assert local_kind(file.fileno()) == "stream"
    read_fd, write_fd = os.pipe()
    assert local_kind(read_fd) == local_kind(write_fd) == "stream"
    os.close(read_fd)
    os.close(write_fd)


# A real device.


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Make loop devices of 4 MiB; needs root."""
    require("losetup")
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("loop devices need root")
    made: list[str] = []

    def make(*options: str) -> str:
        image = tmp_path / f"loop{len(made)}"
        image.write_bytes(b"x" * (4 * MIB))
        losetup = shutil.which("losetup")
        assert losetup is not None
        command = [losetup, "--find", "--show", *options, str(image)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            pytest.skip(f"no loop device: {answer.stderr.strip()}")
        made.append(answer.stdout.strip())
        return made[-1]

    yield make
    for name in made:
        subprocess.run(["losetup", "--detach", name], check=True)


@pytest.mark.parametrize("allocate", [False, True], ids=["sparse", "allocated"])
def test_a_device_is_used_as_it_is(device: Callable[..., str], allocate: bool) -> None:
    name = device()
    end, info, is_zero = open_target(name, 3 * MIB)
    try:
        assert (info.size, is_zero, info.has_extents) == (4 * MIB, False, False)
        assert end.read_now(4 * MIB, 0) == b"x" * (4 * MIB)
        end.zero_now(MIB, MIB, allocate=allocate)
        end.zero_now(1000, 3 * MIB + 1, allocate=allocate)  # no whole sectors: written
        end.write_now(memoryview(b"end"), 4 * MIB - 3)
        end.flush_now()
        expected = bytearray(b"x" * (4 * MIB))
        expected[MIB : 2 * MIB] = bytes(MIB)
        expected[3 * MIB + 1 : 3 * MIB + 1001] = bytes(1000)
        expected[-3:] = b"end"
        other = end.another()
        assert other.read_now(4 * MIB, 0) == expected
        other.close()
        assert end.extents_now(MIB, MIB) == [(MIB, 0)]
        noted = Noted()
        end.write(memoryview(b"xx"), 4 * MIB - 1, noted)
        assert noted.code == errno.ENOSPC
        with pytest.raises(TargetError, match="busy"):  # by us, as by a mount
            open_target(name, 3 * MIB)
    finally:
        end.close()


def test_a_device_that_is_too_small(device: Callable[..., str]) -> None:
    with pytest.raises(SizeMismatchError, match=f"has {4 * MIB} bytes, the source {5 * MIB}"):
        open_target(device(), 5 * MIB)


def test_a_device_that_is_read_only(device: Callable[..., str]) -> None:
    with pytest.raises(TargetError, match="is read-only"):
        open_target(device("--read-only"), MIB)
