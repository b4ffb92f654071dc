"""Warm migration where the source does not tell what changes: all is read, digests are compared."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_gone, program, require
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import MIB, fragmented, serve, serve_qcow2
from tests.integration.test_input_disk import quiet
from tests.waiting import listens, wait_until
from tests.warm_guest import warm_guest
from v2v_async.copy.ranges import Ranges
from v2v_async.copy.throttle import Throttle
from v2v_async.errors import CopyError
from v2v_async.events import Bytes
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm.compare import BLOCK, copy_different, empty_table, read_table, save_table

CONVERTED = b"converted" + bytes(4087)


class Counting(Throttle):
    """Lets through what it counts; of those who ask the first time each has to ask again."""

    taken = 0

    def take(self, length: int, who: Hashable = None, disk: Hashable = None) -> float:
        if not self.taken:
            self.taken = 1
            return 0.001
        self.taken += length
        return 0.0


@pytest.mark.anyio
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_only_what_differs_is_written(short_tmp: Path, image_format: str) -> None:
    source = fragmented(short_tmp / "source", 9 * MIB)
    target = short_tmp / "target"
    argv = ["qemu-img", "create", "-q", "-f", image_format, str(target), str(9 * MIB)]
    subprocess.run(argv, check=True)
    size = source.stat().st_size
    table = empty_table(size)
    async with running_servers(V2VDir(short_tmp)) as servers:
        far = await serve(servers, "far", short_tmp, "file", f"file={source}", read_only=True)
        if image_format == "raw":
            near = await serve(servers, "near", short_tmp, "file", f"file={target}")
        else:
            near = await serve_qcow2(servers, "near", short_tmp, target)

        async def copied(only: Ranges | None = None) -> Bytes:
            reporter = quiet.for_disk(1)
            return await copy_different(far.endpoint, near.endpoint, table, reporter, only)

        first = await copied()
        assert first.copied > 0
        assert first.landed == size
        again = await copied()
        assert (again.copied, again.zero, again.resumed) == (0, 0, size)
        with source.open("r+b") as file:
            file.seek(5 * BLOCK + 7)
            file.write(b"x")
            file.seek(20 * BLOCK)
            file.write(bytes(3 * BLOCK))
            file.seek(size - 1)
            file.write(b"?")
        part = await copied(Ranges([(5 * BLOCK, BLOCK)]))
        assert (part.copied, part.landed) == (BLOCK, size)
        rest = await copied()
        assert rest.copied == BLOCK
        assert rest.zero <= 3 * BLOCK
        rates = Counting(1 << 40)
        await copy_different(far.endpoint, near.endpoint, table, quiet.for_disk(1), throttle=rates)
        assert 0 < rates.taken <= size
        rebuilt = empty_table(size)
        await copy_different(near.endpoint, None, rebuilt, quiet.for_disk(1))
        assert rebuilt == table
    save_table(short_tmp / "table", table)
    assert read_table(short_tmp / "table", size) == table
    assert read_table(short_tmp / "table", size + BLOCK) is None
    assert read_table(short_tmp / "absent", size) is None
    argv = ["qemu-img", "compare", "-f", "raw", "-F", image_format, str(source), str(target)]
    subprocess.run(argv, check=True)


@pytest.mark.anyio
async def test_a_target_that_fails(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source", 9 * MIB)
    async with running_servers(V2VDir(short_tmp)) as servers:
        far = await serve(servers, "far", short_tmp, "file", f"file={source}", read_only=True)
        near = await serve(
            servers, "near", short_tmp, "memory", "9M", "error-pwrite-rate=100%", filters=("error",)
        )
        small = await serve(servers, "small", short_tmp, "memory", "8M")
        for endpoint, said in ((near.endpoint, "write of"), (small.endpoint, "the target has")):
            with pytest.raises(CopyError, match=said) as caught:
                table = empty_table(9 * MIB)
                await copy_different(far.endpoint, endpoint, table, quiet.for_disk(2))
            assert caught.value.disk == 2


class Place:
    """A migration from the command line."""

    def __init__(self, folder: Path, *source: str) -> None:
        self.folder = folder
        self.source = source
        self.out = folder / "out"
        self.out.mkdir()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            "PATH": f"{REPLAY}:{os.environ['PATH']}",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            "TMPDIR": str(folder),
        }

    def run(
        self, command: str, *more: str, script: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        argv = program("v2v-async") if script is None else [sys.executable, "-c", script]
        argv = [*argv, "warm", command, "--state", str(self.folder / "state"), *more]
        if command == "start":
            argv += ["-o", "local", "-os", str(self.out), "-on", "g", *self.source]
        return subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=240
        )

    def does(self, command: str, *more: str) -> str:
        done = self.run(command, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def last(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.does("status", "--json"))["passes"][-1]
        return found

    def assert_migrated(self, *contents: bytes) -> None:
        for number, content in enumerate(contents):
            expected = bytearray(content)
            expected[MIB : MIB + len(CONVERTED)] = CONVERTED
            assert (self.out / f"g-sd{'ab'[number]}").read_bytes() == expected
        assert not (self.folder / "state").exists()
        assert_gone(str(self.folder / "state"))


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_file_that_somebody_writes(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source.img", 12 * MIB)
    place = Place(short_tmp, "-i", "disk", str(source))
    assert "reads all data of 12.0 MiB and compares it" in place.does("start")
    assert "nothing has changed since" in place.does("sync")
    change(source, 3 * BLOCK, b"new" * 5000)
    place.does("sync")
    assert place.last()["disks"][0]["copied"] == BLOCK
    change(source, 40 * BLOCK, bytes(BLOCK))
    change(source, 50 * BLOCK, b"last")
    before = source.read_bytes()
    place.does("cutover")
    place.assert_migrated(before)
    assert source.read_bytes() == before


# The third block is not what was written.
_SPOILT = """
import sys
from v2v_async.warm import migration
real = migration.copy_different

async def spoilt(source, target, table, *more):
    landed = await real(source, target, table, *more)
    if target is None:
        table[40] ^= 1
    return landed

migration.copy_different = spoilt
from v2v_async.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_verified(short_tmp: Path) -> None:
    """The target is read again, and has to hold what was digested."""
    source = fragmented(short_tmp / "source.img", 12 * MIB)
    place = Place(short_tmp, "-i", "disk", str(source))
    done = place.run("start", "--verify", script=_SPOILT)
    assert done.returncode == 1
    assert "does not hold what was written" in done.stderr
    place.does("sync", "--verify", "--bandwidth=1G")
    change(source, 3 * BLOCK, b"new" * 5000)
    place.does("cutover", "--verify")
    place.assert_migrated(source.read_bytes())


# Dies when the target has been written, and nothing of that is noted.
_DIES = """
import os, signal, sys
from v2v_async.warm import migration
migration.save_table = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from v2v_async.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["start", "sync"])
def test_killed_when_it_had_copied(short_tmp: Path, command: str) -> None:
    """What was copied is on the source no more: digests from before would say that all is well."""
    source = fragmented(short_tmp / "source.img", 12 * MIB)
    before = source.read_bytes()
    place = Place(short_tmp, "-i", "disk", str(source))
    if command == "sync":
        place.does("start")
    change(source, 7 * BLOCK, random.Random(1).randbytes(3 * BLOCK))
    assert place.run(command, script=_DIES).returncode == -signal.SIGKILL
    change(source, 7 * BLOCK, before[7 * BLOCK : 10 * BLOCK])
    assert "the target is read first" in place.does("sync")
    place.does("cutover")
    place.assert_migrated(before)


@pytest.mark.parametrize("server_name", ["qemu-nbd", "qemu-storage-daemon"])
def test_the_dirty_bitmap_of_an_export(short_tmp: Path, server_name: str) -> None:
    """Only what is dirty is read again."""
    require(server_name)
    plain = fragmented(short_tmp / "plain", 12 * MIB)
    content = bytearray(plain.read_bytes())
    image, socket = short_tmp / "source.qcow2", short_tmp / "export"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(plain), str(image)], check=True)
    subprocess.run(["qemu-img", "bitmap", "--add", str(image), "moves"], check=True)
    argv = ["qemu-nbd", "-t", "-f", "qcow2", "-B", "moves", f"--socket={socket}", str(image)]
    argv.append("--shared=0")
    uri = f"nbd+unix:///?socket={socket}"
    if server_name == "qemu-storage-daemon":
        argv = [server_name, "--blockdev", f"driver=file,filename={image},node-name=file"]
        argv += ["--blockdev", "driver=qcow2,file=file,node-name=disk"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"]
        argv += ["--export", "nbd,id=e,node-name=disk,name=web,writable=on,bitmaps.0=moves"]
        uri = f"nbd+unix:///web?socket={socket}"
    server = subprocess.Popen(argv)
    try:
        wait_until(lambda: listens(socket), "it serves", of=server)
        place = Place(short_tmp, "-i", "disk", "--bitmap", "moves", uri)
        assert "dirty in the bitmap" in place.does("start")
        for offset in (5 * BLOCK, 99 * BLOCK):
            write = ["qemu-io", "-f", "raw", "-c", f"write -P 7 {offset} 512", uri]
            subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
            content[offset : offset + 512] = b"\7" * 512
            place.does("sync")
            assert place.last()["disks"][0]["copied"] == BLOCK
        place.does("cutover")
    finally:
        server.terminate()
        server.wait(30)
    place.assert_migrated(bytes(content))


def test_a_bitmap_that_is_not_there(short_tmp: Path) -> None:
    source = fragmented(short_tmp / "source.img", MIB)
    for words, said in (
        (("-i", "disk", "--bitmap", "b", str(source)), "--bitmap is of NBD exports"),
        (("-i", "disk", "--bitmap", "b", "nbd://localhost:1/x"), "can't connect"),
    ):
        done = Place.run(_elsewhere(short_tmp, *words), "start")
        assert done.returncode in (1, 2)
        assert said in done.stderr
        assert not (short_tmp / "state").exists()


def _elsewhere(folder: Path, *words: str) -> Place:
    made = Place.__new__(Place)
    (folder / "out").mkdir(exist_ok=True)
    made.folder, made.source, made.out = folder, words, folder / "out"
    made.environment = dict(os.environ)
    return made


def test_a_running_guest_with_raw_disks(short_tmp: Path) -> None:
    """They have no bitmaps; what is read is of one moment all the same."""
    require("libvirtd", "qemu-system-x86_64")
    with warm_guest(short_tmp, "raw") as guest:
        guest.start()
        where = ["-i", "libvirt", "-ic", guest.uri, "--socket-dir", str(short_tmp / "sockets")]
        place = Place(short_tmp, *where, "g")
        assert "does not tell what changes" in place.does("start")
        guest.write_here_and_there()
        place.does("sync")
        assert not place.last()["is_all"]
        guest.write_here_and_there()
        guest.stop()
        place.does("cutover")
        place.assert_migrated(*map(bytes, guest.contents))
        assert guest.checkpoints() == []
