"""The copier is killed, and the same command goes on: nothing lost, and nothing wrong taken."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fault.restarting import FORGETTING, Restarting, nbdkit
from tests.integration.servers import MIB, digest
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio

SIZE = 40 * MIB  # ten chunks, each of which may be remembered by itself
# Two chunks of 4 MiB at a time, so that what is remembered grows by steps of 8.
SLOWLY = ("--bandwidth=12MB/s", "--connections=2")
# What takes seconds is remembered every tenth of one; a write beyond the limit fails as on a full
# file system.
# ``most``: bytes of data after which it stands still, so that it can't end before it is killed, be
# the test as slow as it may.
_PROGRAM = """
import resource, signal, sys
from v2v_async.copy import remembering, throttle
remembering.Memory.interval_s = 0.1
limit, most = int(sys.argv.pop(1)), int(sys.argv.pop(1))
if limit >= 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if most >= 0:
    take, taken = throttle.Throttle.take, []
    def take_some(self, length, *who):
        if sum(taken) + length > most:
            return throttle.MAX_WAIT_S
        seconds = take(self, length, *who)
        if not seconds:
            taken.append(length)
        return seconds
    throttle.Throttle.take = take_some
from v2v_async.cli.main import main
sys.exit(main())
"""


class Copier:
    """``v2v-async copy`` with a checkpoint, as a process, in a folder of its own."""

    def __init__(self, folder: Path, source: str, target: str) -> None:
        self.folder = folder
        self.checkpoint = folder / "ck"
        self._words = [source, target]

    @contextmanager
    def running(
        self, *options: str, limit: int = -1, most: int = -1, events: str = "events"
    ) -> Iterator[subprocess.Popen[str]]:
        """Have one running; it is gone at the end."""
        words = [f"--checkpoint={self.checkpoint}", "--digest"]
        if limit < 0:
            words.append(f"--events={self.folder / events}")
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", _PROGRAM, str(limit), str(most)),
                *("copy", *words, *options, *self._words),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *options: str, limit: int = -1) -> subprocess.CompletedProcess[str]:
        """Run one to its end."""
        with self.running(*options, limit=limit) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def run_until(self, part: int) -> None:
        """Run one slowly, and kill it when so many MiB are remembered (0: when it has begun)."""

        def condition() -> bool:
            return self.remembered >= part * MIB if part else self.has_begun()

        # Two chunks may be there in part. What is there already is read for the digest.
        with self.running(*SLOWLY, most=(part + 8) * MIB) as process:
            self.wait(condition, f"{part} MiB are remembered", process)
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL

    def wait(
        self, condition: Callable[[], bool], what: str, process: subprocess.Popen[str]
    ) -> None:
        """Wait until something is so; the process must be running then."""

        def told() -> str:
            return what if process.poll() is None else f"{what}: {process.communicate()}"

        wait_until(condition, told, within_s=120, of=process)

    def has_begun(self) -> bool:
        """Whether the folder is known to be the copier's own."""
        try:
            return (self.checkpoint / "lock").read_text().startswith("made")
        except FileNotFoundError:
            return False

    @property
    def remembered(self) -> int:
        """How many bytes of the disk are known to be durable."""
        try:
            record = json.loads((self.checkpoint / "disk-1.json").read_text())["record"]
        except FileNotFoundError:
            return 0
        # Distances: to a range, over it, to the next one, ….
        steps: list[int] = record["done"]["steps"]
        done: int = sum(steps[1::2]) * record["done"]["unit"]
        return done

    @property
    def last(self) -> dict[str, Any]:
        """The bytes that the last event of the disk tells."""
        found: dict[str, Any] = {}
        for line in (self.folder / "events").read_text().splitlines():
            event = json.loads(line)
            if "disk" in event and event.get("bytes"):
                found = event["bytes"]
        return found


@pytest.fixture
def source(short_tmp: Path) -> Path:
    """A disk of data, with a hole."""
    path = short_tmp / "s"
    noise = random.Random(3)
    path.write_bytes(noise.randbytes(SIZE - 6 * MIB) + bytes(5 * MIB) + noise.randbytes(MIB))
    return path


@pytest.fixture
def target(short_tmp: Path) -> Path:
    """What was there before is wrong everywhere."""
    path = short_tmp / "t"
    path.write_bytes(b"\xd5" * SIZE)
    return path


def served(folder: Path, source: Path, target: Path, kind: str = "file") -> list[Restarting]:
    """Return servers for both; nbdkit 1.32 aborts when its client is killed, so they come back."""
    plugin = ["file", f"file={target}"]
    if kind == "forgets":
        plugin = ["python", str(FORGETTING), f"file={target}"]
    reader = nbdkit(folder / "in", "--readonly", "file", f"file={source}")
    writer = nbdkit(folder / "out", *plugin)
    return [
        Restarting(reader, folder / "in", is_kept=True),
        Restarting(writer, folder / "out", is_kept=True),
    ]


async def both_up(one: Restarting, two: Restarting) -> None:
    """Wait for what has aborted with its client."""
    await one.up()
    await two.up()


@pytest.mark.parametrize("part", [0, 4, 12, 20])
@pytest.mark.parametrize("kind", ["local", "file", "forgets"])
async def test_a_killed_copy_goes_on(
    short_tmp: Path, source: Path, target: Path, kind: str, part: int
) -> None:
    """Killed when so many MiB were remembered (0: at the start); a target that forgets, too."""
    expected = digest_of(source)
    one, two = served(short_tmp, source, target, kind)
    async with one, two:
        ends = (str(source), str(target)) if kind == "local" else (one.uri, two.uri)
        copier = Copier(short_tmp, *ends)
        copier.run_until(part)
        if kind == "forgets":
            two.kill()
        await both_up(one, two)
        done = copier.run()
    assert done.returncode == 0, done.stderr
    assert digest(target) == digest(source)
    assert done.stdout.split()[-1] == expected
    told = copier.last
    assert told["resumed"] >= part * MIB
    assert told["resumed"] + told["copied"] + told["zero"] + told["skipped"] == SIZE
    assert not copier.checkpoint.exists()


async def test_killed_again_and_again(short_tmp: Path, source: Path, target: Path) -> None:
    """Each life goes on from the one before."""
    one, two = served(short_tmp, source, target, "forgets")
    async with one, two:
        copier = Copier(short_tmp, one.uri, two.uri)
        for part in (4, 12, 20):
            copier.run_until(part)
            two.kill()
            await both_up(one, two)
        done = copier.run("--verify")
    assert done.returncode == 0, done.stderr
    assert digest(target) == digest(source)
    assert done.stdout.split()[-1] == digest_of(source)
    assert copier.last["resumed"] >= 20 * MIB


def _change_source(source: Path, target: Path) -> None:
    with source.open("r+b") as file:
        file.write(b"changed")


def _new_target(source: Path, target: Path) -> None:
    target.write_bytes(bytes(SIZE))


def _other_target(source: Path, target: Path) -> None:
    target.write_bytes(b"\x11" * SIZE)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (_change_source, [], ["the source has changed since", "disk 1, offset 0"]),
        (_new_target, [], ["the target does not hold", "reads as zeroes", "offset"]),
        (_other_target, [], ["the target does not hold what was copied to it", "offset"]),
        (None, ["--allocated"], ["the options is not what it was"]),
    ],
    ids=["source-changed", "target-made-anew", "other-target", "other-options"],
)
async def test_what_does_not_fit_is_refused(
    short_tmp: Path,
    source: Path,
    target: Path,
    change: Callable[[Path, Path], None] | None,
    options: list[str],
    said: list[str],
) -> None:
    """Nothing is written then, and the checkpoint stays for the right command."""
    one, two = served(short_tmp, source, target)
    async with one, two:
        copier = Copier(short_tmp, one.uri, two.uri)
        copier.run_until(8)
        await both_up(one, two)
        if change is not None:
            change(source, target)
        before = digest(target)
        done = copier.run(*options)
    assert done.returncode == 1
    assert digest(target) == before
    assert copier.remembered >= 8 * MIB
    for text in [*said, f"remove {copier.checkpoint} to begin again"]:
        assert text in done.stderr


async def test_a_folder_in_use_is_refused(short_tmp: Path, source: Path, target: Path) -> None:
    one, two = served(short_tmp, source, target)
    async with one, two:
        copier = Copier(short_tmp, one.uri, two.uri)
        with copier.running(*SLOWLY, events="first") as first:
            copier.wait(lambda: copier.remembered > 0, "something is remembered", first)
            second = copier.run()
            assert second.returncode == 1
            assert f"another run (process {first.pid}) is using" in second.stderr
            _, said = first.communicate(timeout=120)
        assert first.returncode == 0, said
    assert digest(target) == digest(source)
    assert not copier.checkpoint.exists()


async def test_a_checkpoint_that_can_not_be_saved_is_a_warning(
    short_tmp: Path, source: Path, target: Path
) -> None:
    one, two = served(short_tmp, source, target)
    async with one, two:
        done = Copier(short_tmp, one.uri, two.uri).run("--bandwidth=60MB/s", limit=64)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the checkpoint") == 1
    assert "could not be saved" in done.stderr
    assert digest(target) == digest(source)


def digest_of(path: Path) -> str:
    """Return what --digest has to print, computed in the plainest way."""
    import hashlib

    content, block = path.read_bytes(), 64 << 10
    outer = hashlib.sha256()
    for at in range(0, len(content), block):
        outer.update(hashlib.sha256(content[at : at + block]).digest())
    outer.update(len(content).to_bytes(8, "little"))
    return outer.hexdigest()
