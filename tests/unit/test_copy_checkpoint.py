from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2v_async.copy import checkpoint as module
from v2v_async.copy.checkpoint import CheckpointFolder, Record, SaveError
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.samples import (
    BLOCK,
    SAMPLES,
    Read,
    Sample,
    WrittenSamples,
    difference,
    digest,
    file_identity,
    identify,
    sample_offsets,
)
from v2v_async.errors import CopyError

MIB = 1 << 20
SIZE = 40 * MIB + 1000  # odd, so that the last block is short


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[CheckpointFolder]:
    with CheckpointFolder(tmp_path / "checkpoint") as folder:
        yield folder


def reader(content: bytes | bytearray) -> Read:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(content)
        return bytes(content[offset : offset + length])

    return read


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- samples ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 1 << 50), st.integers(0, 3))
def test_sample_offsets_are_blocks_from_the_first_to_the_last(size: int, seed: int) -> None:
    offsets = sample_offsets(size, seed)
    assert offsets == sample_offsets(size, seed)
    assert offsets == sorted(set(offsets))
    assert len(offsets) <= SAMPLES
    assert all(offset % BLOCK == 0 and 0 <= offset < size for offset in offsets)
    if size:
        assert offsets[0] == 0
        assert offsets[-1] + BLOCK >= size
    if size > MIB:
        assert MIB in offsets
    if size >= SAMPLES * BLOCK:
        assert len(offsets) >= SAMPLES - 3  # two strata may have drawn the first or last block
        widest = max(b - a for a, b in pairwise(offsets))
        assert widest <= 2 * (size / (SAMPLES - 3) + BLOCK)


def test_a_changed_block_is_found() -> None:
    disk = bytearray(random.Random(1).randbytes(SIZE))
    samples = identify(reader(disk), SIZE)
    assert difference(samples, reader(disk)) is None
    assert samples[-1].length == 1000
    for sample in samples:
        changed = disk[sample.offset]
        disk[sample.offset] ^= 1
        assert difference(samples, reader(disk)) == sample
        disk[sample.offset] = changed


def test_written_samples_are_spread_over_what_is_not_zero() -> None:
    offsets = [at * 65536 for at in range(10_000)]
    random.Random(2).shuffle(offsets)
    first, second = WrittenSamples(), WrittenSamples()
    data = random.Random(3).randbytes(65536)
    for offset in offsets:
        first.offer(offset, memoryview(data if offset % 131072 else bytes(65536)))
    for offset in sorted(offsets):
        second.offer(offset, memoryview(data if offset % 131072 else bytes(65536)))
    everything = Ranges([(0, 10_000 * 65536)])
    kept = first.inside(everything)
    assert kept == second.inside(everything)  # whatever the order
    assert len(kept) == SAMPLES
    assert all(sample.offset % 131072 and not sample.is_zero for sample in kept)
    assert {sample.digest for sample in kept} == {digest(data[:BLOCK])}
    quarters = [sample.offset // (2500 * 65536) for sample in kept]
    assert min(quarters.count(quarter) for quarter in range(4)) >= 5


def test_written_samples_tell_only_what_is_done_and_go_on_at_resume() -> None:
    written = WrittenSamples()
    for at in range(100):
        written.offer(at * BLOCK, memoryview(bytes([at + 1]) * BLOCK))
    done = Ranges([(0, 50 * BLOCK + 1)])
    inside = written.inside(done)
    assert inside
    assert all(sample.offset + BLOCK <= 50 * BLOCK for sample in inside)
    again = WrittenSamples(inside)
    assert again.inside(done) == inside


def test_what_is_written_again_is_sampled_again() -> None:
    everything = Ranges([(0, 1000 * BLOCK)])
    written = WrittenSamples()
    for content in (b"wrong at first", b"and then right"):
        for at in range(1000):
            written.offer(at * BLOCK, memoryview(content))
        kept = written.inside(everything)
        assert len(kept) == SAMPLES
        assert {sample.digest for sample in kept} == {digest(content)}


def test_writing_or_replacing_a_file_changes_its_identity(tmp_path: Path) -> None:
    path, other = tmp_path / "disk", tmp_path / "other"
    for each in (path, other):
        each.write_bytes(b"same")
        os.utime(each, ns=(1, 1))
    before = file_identity(path)
    assert before
    path.write_bytes(b"same")
    assert file_identity(path) != before
    os.utime(path, ns=(5, 1))
    assert file_identity(path) == before  # reading it is nothing
    other.rename(path)
    assert file_identity(path) != before
    assert file_identity(tmp_path) == file_identity(tmp_path / "none") == ""


# --- records ------------------------------------------------------------------------------------

ranges = st.lists(st.tuples(st.integers(0, 1 << 45), st.integers(1, 1 << 30)), max_size=30)
samples = st.lists(
    st.builds(Sample, st.integers(0, 1 << 50), st.integers(1, BLOCK), st.just("ab" * 16)),
    max_size=3,
)
records = st.builds(
    Record,
    source=st.sampled_from(["/disk.img", "nbd://host/ü", "[ nbdkit file x ]", "\udcff"]),
    target=st.just("/out"),
    source_size=st.integers(0, 1 << 60),
    target_size=st.integers(0, 1 << 60),
    source_identity=st.sampled_from(["", "5:77"]),
    source_samples=samples,
    target_samples=samples,
    done=st.builds(Ranges, ranges),
    target_was_zero=st.booleans(),
    is_complete=st.booleans(),
    options=st.dictionaries(st.sampled_from(["allocated", "sparse"]), st.none() | st.integers()),
)


@settings(deadline=None)  # the disk may be busy
@given(record=records)
def test_what_is_saved_is_loaded(record: Record, tmp_path_factory: pytest.TempPathFactory) -> None:
    with CheckpointFolder(tmp_path_factory.mktemp("saved") / "checkpoint") as folder:
        folder.disk(3).save(record)
        assert folder.disk(3).load() == record
        assert folder.disk(2).load() is None


def record_of(count: int = 5) -> Record:
    return Record("/a", "/b", SIZE, SIZE, done=Ranges((at * 8192, 4096) for at in range(count)))


def test_only_its_owner_may_read_it(folder: CheckpointFolder) -> None:
    umask = os.umask(0)
    try:
        folder.disk(1).save(record_of())
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert names(folder.path) == {"lock", "disk-1.json"}
    for name in names(folder.path):
        assert stat.S_IMODE((folder.path / name).stat().st_mode) == 0o600


def test_no_secret_is_stored_and_a_new_password_is_no_other_disk(folder: CheckpointFolder) -> None:
    disk = bytes(SIZE)
    record = replace(
        record_of(), source="nbd+ssh://me:hunter2@host/x", target="[ nbdkit vddk password=hunter2 ]"
    )
    checkpoint = folder.disk(1)
    checkpoint.save(record)
    assert "hunter2" not in checkpoint.path.read_text()
    loaded = checkpoint.load()
    assert loaded is not None
    now = replace(record, source="nbd+ssh://me:swordfish@host/x")
    checkpoint.prove(loaded, now, reader(disk), reader(disk))


def test_too_many_ranges_lose_the_shortest(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RANGES", 2)
    done = Ranges([(0, 9), (20, 3), (40, 7)])
    folder.disk(1).save(replace(record_of(), done=done))
    loaded = folder.disk(1).load()
    assert loaded is not None
    assert list(loaded.done) == [(0, 9), (40, 7)]
    assert len(done) == 3


def test_a_hundred_thousand_ranges_are_less_than_a_mebibyte(folder: CheckpointFolder) -> None:
    numbers = random.Random(4)
    done, at = Ranges(), 0
    for _ in range(100_000):
        at += numbers.randrange(1, 100) * 4096
        done.add(at, 4096 * numbers.randrange(1, 100))
        at = done.end
    folder.disk(1).save(replace(record_of(), source_size=at, done=done))
    assert folder.disk(1).path.stat().st_size < MIB
    loaded = folder.disk(1).load()
    assert loaded is not None
    assert loaded.done == done


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", "not a checkpoint"),
        (lambda raw: raw[: len(raw) // 2], "not a checkpoint"),
        (lambda raw: bytes(len(raw)), "not a checkpoint"),
        (lambda raw: b"[" * 100_000, "not a checkpoint"),
        (lambda raw: b"[]", "not a checkpoint"),
        (lambda raw: b'{"version": 1}', "not a checkpoint"),
        (lambda raw: raw.replace(b'"version": 1', b'"version": 2'), "another version"),
        (lambda raw: raw.replace(b'"steps":[0,1', b'"steps":[0,9'), "damaged, or was edited"),
        (lambda raw: json.dumps(json.loads(raw)).encode(), "damaged, or was edited"),
    ],
)
def test_what_is_no_record_is_refused(
    folder: CheckpointFolder, damage: Callable[[bytes], bytes], message: str
) -> None:
    checkpoint = folder.disk(2)
    checkpoint.save(record_of())
    raw = checkpoint.path.read_bytes()
    assert damage(raw) != raw
    checkpoint.path.write_bytes(damage(raw))
    with pytest.raises(CopyError, match=message) as caught:
        checkpoint.load()
    assert str(checkpoint.path) in str(caught.value)
    assert str(folder.path) in (caught.value.hint or "")
    assert caught.value.disk == 2
    checkpoint.save(record_of())  # who goes on all the same can
    assert checkpoint.load() == record_of()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "huge"])
def test_what_is_no_file_of_ours_is_refused(folder: CheckpointFolder, kind: str) -> None:
    checkpoint = folder.disk(1)
    if kind == "pipe":
        os.mkfifo(checkpoint.path)
    elif kind == "link":
        checkpoint.path.symlink_to("/etc/passwd")
    elif kind == "folder":
        checkpoint.path.mkdir()
    else:
        checkpoint.path.touch()
        os.truncate(checkpoint.path, 1 << 40)
    with pytest.raises(CopyError, match="checkpoint"):
        checkpoint.load()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_record_of_another_user_is_refused(folder: CheckpointFolder) -> None:
    folder.disk(1).save(record_of())
    os.chown(folder.disk(1).path, 12345, 12345)
    with pytest.raises(CopyError, match="this user"):
        folder.disk(1).load()


# --- saving that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_last_record(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoint = folder.disk(1)
    checkpoint.save(record_of(1))

    def fail(*args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(SaveError, match="No space left") as caught:
            checkpoint.save(record_of(2))
    assert "go on" in (caught.value.hint or "")
    assert names(folder.path) == {"lock", "disk-1.json"}  # what filled the disk is gone
    assert checkpoint.load() == record_of(1)
    checkpoint.save(record_of(3))  # there is room again
    assert checkpoint.load() == record_of(3)


def run(code: str, *arguments: Path | str) -> subprocess.Popen[str]:
    """Start Python with this module's names at hand."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from {__name__} import *\nimport sys\n{code}",
            *map(str, arguments),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_file_system_that_takes_only_a_part_leaves_the_last_record(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the kernel writes a part, then fails."""
    code = """
import resource
with CheckpointFolder(Path(sys.argv[1])) as folder:
    folder.disk(1).save(record_of(10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        folder.disk(1).save(record_of(20000))
    except SaveError as error:
        print(error, error.__cause__.errno)
"""
    path = tmp_path / "checkpoint"
    with run(code, path) as process:
        told, _ = process.communicate(timeout=60)
    assert str(errno.EFBIG) in told
    with CheckpointFolder(path) as folder:
        assert folder.disk(1).load() == record_of(10)
        assert names(path) == {"lock", "disk-1.json"}


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_death_at_any_step_leaves_a_whole_record(tmp_path: Path, call: str, when: str) -> None:
    code = """
import signal
with CheckpointFolder(Path(sys.argv[1])) as folder:
    folder.disk(1).save(record_of(1))
    real = getattr(os, sys.argv[2])
    def die(*args, **options):
        if sys.argv[3] == "after":
            real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, sys.argv[2], die)
    folder.disk(1).save(record_of(50))
"""
    path = tmp_path / "checkpoint"
    with run(code, path, call, when) as process:
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with CheckpointFolder(path) as folder:
        is_new = (call, when) == ("replace", "after")
        assert folder.disk(1).load() == record_of(50 if is_new else 1)
        folder.disk(1).save(record_of(3))  # what was half written, and is longer, is no matter
        assert folder.disk(1).load() == record_of(3)
        folder.finish()
    assert not path.exists()


@pytest.mark.parametrize("seed", range(8))
def test_kill_at_any_moment_leaves_a_whole_record(tmp_path: Path, seed: int) -> None:
    code = """
record = record_of(3000)
with CheckpointFolder(Path(sys.argv[1])) as folder:
    count = 0
    while True:
        count += 1
        record.options = {"count": count}
        print("before", count, flush=True)
        folder.disk(1).save(record)
        print("after", count, flush=True)
"""
    path = tmp_path / "checkpoint"
    with run(code, path) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(random.Random(seed).randrange(3, 100))]
        process.kill()
        lines += process.stdout.readlines()
    with CheckpointFolder(path) as folder:
        loaded = folder.disk(1).load()
    assert loaded is not None
    assert loaded == replace(record_of(3000), options=loaded.options)
    begun, saved = (
        max(int(line.split()[1]) for line in lines if line.startswith(word) and line[-1] == "\n")
        for word in ("before", "after")
    )
    assert loaded.options["count"] in (saved, begun)


# --- the folder ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with CheckpointFolder(path) as first:
        first.disk(1).save(record_of())
        with pytest.raises(CopyError, match="another run") as caught:
            with CheckpointFolder(path):
                pass
        assert f"process {os.getpid()}" in str(caught.value)
        assert caught.value.hint
        first.disk(1).save(record_of(7))  # the one refused has taken nothing away
    with CheckpointFolder(path) as second:
        assert second.disk(1).load() == record_of(7)


def test_another_process_is_refused_and_death_unlocks(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    code = """
with CheckpointFolder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), 9)
"""
    with subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import *\nimport sys\n{code}", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(CopyError, match=f"process {process.pid}"):
            CheckpointFolder(path).__enter__()
        process.communicate(timeout=60)
    with CheckpointFolder(path) as folder:
        assert folder.disk(1).load() is None


def test_a_run_that_finishes_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with CheckpointFolder(path) as folder:
        folder.disk(1).save(record_of())
    with CheckpointFolder(path) as folder:  # not the one that made the folder
        folder.disk(1)
        folder.disk(2).save(record_of())
        folder.finish()
    assert not path.exists()
    with CheckpointFolder(path) as folder:
        assert folder.disk(1).load() is None


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    path = tmp_path / "given"
    path.mkdir()
    with CheckpointFolder(path) as folder:
        folder.disk(1).save(record_of())
        folder.finish()
    assert names(path) == set()
    other = tmp_path / "made"
    with CheckpointFolder(other) as folder:
        folder.disk(1).save(record_of())
        (other / "notes.txt").write_text("mine")
        folder.finish()
    assert names(other) == {"notes.txt"}


@pytest.mark.parametrize("has_third", [False, True])
def test_a_lock_that_was_removed_meanwhile_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_third: bool
) -> None:
    """Another run finishes after this one has opened the lock and before it has locked it."""
    path = tmp_path / "checkpoint"
    first, third = CheckpointFolder(path).__enter__(), CheckpointFolder(path)
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        first.finish()
        first.__exit__(None, None, None)
        if has_third:  # which begins at that very moment
            third.__enter__()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    if has_third:
        with pytest.raises(CopyError, match="another run"):
            CheckpointFolder(path).__enter__()
        third.disk(1).save(record_of())
        third.finish()
        third.__exit__(None, None, None)
    else:
        with CheckpointFolder(path) as folder:
            assert names(path) == {"lock"}
            with pytest.raises(CopyError, match="another run"):
                CheckpointFolder(path).__enter__()
            folder.finish()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "missing parent", "dangling link"])
def test_a_folder_that_can_not_be_used_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint"
    if kind == "file":
        path.touch()
    elif kind == "missing parent":
        path = path / "deeper"
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CopyError, match="can’t be used") as caught:
        CheckpointFolder(path).__enter__()
    assert str(path) in str(caught.value)
    assert "--checkpoint" in (caught.value.hint or "")


def test_the_folder_taken_away_fails_the_save_only(folder: CheckpointFolder) -> None:
    folder.disk(1).save(record_of())
    for name in names(folder.path):
        (folder.path / name).unlink()
    folder.path.rmdir()
    with pytest.raises(SaveError):
        folder.disk(1).save(record_of())


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with CheckpointFolder(tmp_path / "checkpoint") as folder:
            folder.disk(1).save(record_of())
            folder.disk(1).load()
            with pytest.raises(CopyError):
                CheckpointFolder(folder.path).__enter__()
        (tmp_path / "checkpoint" / "disk-1.json").write_text("x")
        with CheckpointFolder(tmp_path / "checkpoint") as folder, pytest.raises(CopyError):
            folder.disk(1).load()
    assert len(os.listdir("/proc/self/fd")) == before


# --- the proof -----------------------------------------------------------------------------------


class Copied:
    """A sparse disk, half of it copied: 20 MiB done, 3 of its blocks with data."""

    DATA = (5 * MIB + BLOCK, 5 * MIB + 2 * BLOCK, 17 * MIB)

    def __init__(self, folder: CheckpointFolder) -> None:
        self.checkpoint = folder.disk(1)
        self.source = bytearray(SIZE)
        self.target = bytearray(SIZE)
        written = WrittenSamples()
        for number, offset in enumerate(self.DATA):
            self.source[offset : offset + BLOCK] = bytes([number + 1]) * BLOCK
            self.target[offset : offset + BLOCK] = self.source[offset : offset + BLOCK]
            written.offer(offset, memoryview(self.source)[offset : offset + BLOCK])
        self.source[30 * MIB : 31 * MIB] = b"z" * MIB  # not copied yet
        self.now = Record("/a", "/b", SIZE, SIZE, "1:1", options={"allocated": False})
        done = Ranges([(0, 20 * MIB)])
        self.checkpoint.save(
            replace(
                self.now,
                source_samples=identify(reader(self.source), SIZE),
                target_samples=written.inside(done),
                done=done,
            )
        )

    def prove(self) -> None:
        record = self.checkpoint.load()
        assert record is not None
        read_source, read_target = set[tuple[int, int]](), set[tuple[int, int]]()

        def source(offset: int, length: int) -> bytes:
            read_source.add((offset, length))
            return reader(self.source)(offset, length)

        def target(offset: int, length: int) -> bytes:
            read_target.add((offset, length))
            return reader(self.target)(offset, length)

        self.checkpoint.prove(record, self.now, source, target)
        assert read_source == set(record.source_places())
        assert read_target == set(record.target_places())
        assert all(record.done.contains(*place) for place in read_target)


@pytest.fixture
def copied(folder: CheckpointFolder) -> Copied:
    return Copied(folder)


def test_the_same_disks_are_taken_for_the_same(copied: Copied) -> None:
    copied.prove()
    copied.target[25 * MIB] = 1  # landed, but was not flushed before the crash
    copied.prove()
    copied.now.source_identity = ""
    copied.prove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "/c"}, "source is not what it was: ‘/c’, then ‘/a’"),
        ({"target": "/c"}, "target is not what it was"),
        ({"source_size": SIZE + 1}, "size of the source"),
        ({"target_size": SIZE + 1}, "size of the target"),
        ({"source_identity": "1:2"}, "source has been written or replaced"),
        ({"options": {"allocated": True}}, "allocated True"),
    ],
)
def test_other_disks_and_other_options_are_refused(
    copied: Copied, changes: dict[str, object], message: str
) -> None:
    for name, value in changes.items():
        setattr(copied.now, name, value)
    with pytest.raises(CopyError, match=message) as caught:
        copied.prove()
    assert caught.value.disk == 1
    assert str(copied.checkpoint.path.parent) in (caught.value.hint or "")


def test_a_target_made_anew_is_refused(copied: Copied) -> None:
    copied.target = bytearray(SIZE)
    with pytest.raises(CopyError, match="target does not hold .* reads as zeroes") as caught:
        copied.prove()
    assert caught.value.offset in Copied.DATA
    assert "new one" in (caught.value.hint or "")


def test_a_target_with_something_else_is_refused(copied: Copied) -> None:
    copied.target = bytearray(b"\xff") * SIZE
    with pytest.raises(CopyError, match="target does not hold what was copied to it$"):
        copied.prove()


def test_a_target_that_differs_between_the_samples_is_refused(copied: Copied) -> None:
    record = copied.checkpoint.load()
    assert record is not None
    sampled = {sample.offset for sample in record.target_expected()}
    places = [place for place in record.target_places() if place[0] not in sampled]
    assert len(places) > 20
    for offset, length in places:
        copied.target[offset + length - 1] = 1
        with pytest.raises(CopyError, match="target does not hold") as caught:
            copied.prove()
        assert caught.value.offset == offset
        copied.target[offset + length - 1] = 0


def test_a_source_of_the_same_size_with_something_else_is_refused(copied: Copied) -> None:
    copied.source = bytearray(random.Random(7).randbytes(SIZE))
    with pytest.raises(CopyError, match="source has changed") as caught:
        copied.prove()
    assert caught.value.offset == 0


@pytest.mark.parametrize("offset", [MIB + 1024, Copied.DATA[0], SIZE - 1])
def test_a_source_written_to_since_is_refused(copied: Copied, offset: int) -> None:
    """A file system at 1 MiB was mounted, a block that was copied or the last one was written."""
    copied.source[offset] ^= 1
    with pytest.raises(CopyError, match="source has changed") as caught:
        copied.prove()
    assert caught.value.offset == offset // BLOCK * BLOCK


def test_disks_that_changed_places_are_refused(folder: CheckpointFolder) -> None:
    first, second = folder.disk(1), folder.disk(2)
    disk = reader(bytes(SIZE))
    record = Record("/same", "/one", SIZE, SIZE)
    first.save(record)
    second.save(replace(record, target="/two"))
    loaded = first.load()
    assert loaded is not None
    first.prove(loaded, record, disk, disk)
    with pytest.raises(CopyError, match="‘/two’, then ‘/one’"):
        first.prove(loaded, replace(record, target="/two"), disk, disk)


@settings(max_examples=30, deadline=None)
@given(
    done=st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, MIB)), max_size=10),
    seed=st.integers(0, 100),
)
def test_any_true_record_is_proven(
    done: list[tuple[int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Copy any ranges of a disk, at any alignment, and take the record for proof."""
    size = 4 * MIB + seed
    numbers = random.Random(seed)
    source = bytes(size // 2) + numbers.randbytes(size - size // 2)
    target = bytearray(numbers.randbytes(size + 500))
    written, landed = WrittenSamples(), Ranges()
    for offset, length in done:
        offset %= size
        length = min(length, size - offset)
        target[offset : offset + length] = source[offset : offset + length]
        written.offer(offset, memoryview(source)[offset : offset + length])
        landed.add(offset, length)
    now = Record("/a", "/b", size, size + 500)
    record = replace(now, source_samples=identify(reader(source), size), done=landed)
    record.target_samples = written.inside(landed)
    checkpoint = CheckpointFolder(tmp_path_factory.getbasetemp()).disk(1)
    checkpoint.prove(record, now, reader(source), reader(target))
