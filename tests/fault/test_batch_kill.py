"""A batch whose supervisor is killed again and again: what it makes is right, and nothing is left.

``benchmarks/batch_kills.py`` does the same for longer.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.batches import Batch
from tests.conftest import ROOT, assert_gone
from tests.integration.servers import MIB
from tests.waiting import listens, wait_until

_READ = re.compile(r" Read id=\d+ offset=\S+ count=0x([0-9a-f]+) ")
# The copies take longer than all moments together: else a run may end before its last kill.
_LONGER = 1.2
_FIRST_S = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """How often a supervisor was really killed, and the bytes read for each byte of data."""

    kills: int
    read_ratio: float


@contextmanager
def counted_sources(batch: Batch) -> Iterator[list[Path]]:
    """Serve each source disk from outside the batch, noting what is read; yield the notes."""
    notes: list[Path] = []
    servers: list[subprocess.Popen[bytes]] = []
    guests: dict[str, str] = {}
    try:
        for name, disks in batch.disks.items():
            uris = []
            for disk in disks:
                socket, note = disk.with_suffix(".sock"), disk.with_suffix(".log")
                argv = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=log", "file", str(disk)]
                servers.append(subprocess.Popen([*argv, f"logfile={note}"]))
                notes.append(note)
                uris.append(f"nbd+unix:///?socket={socket}")
            words = ", ".join(f'"{uri}"' for uri in uris)
            guests[name] = f'input = {{ type = "disk", source = [{words}] }}'
        for disk in (disk for disks in batch.disks.values() for disk in disks):
            wait_until(partial(listens, disk.with_suffix(".sock")), f"{disk} is served")
        batch.sources_by_guest = guests
        yield notes
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def bytes_read(notes: list[Path]) -> int:
    """Return how many bytes have been read from all sources."""
    return sum(
        int(found, 16)
        for note in notes
        for found in _READ.findall(note.read_text(errors="replace"))
    )


def kill_often(batch: Batch, moments: Sequence[float]) -> int:
    """Run the batch, killing each supervisor after so many seconds; return how many were killed."""
    words = ["run", str(batch.plan), "--name", "r"]
    killed = 0
    while True:
        process = batch.begin(*words)
        if killed == len(moments):
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            return killed
        try:
            output, _ = process.communicate(timeout=moments[killed])
        except subprocess.TimeoutExpired:
            batch.kill(process)
            killed += 1
            # Its servers die with it: nothing runs while nobody supervises.
            assert_gone(str(batch.tmp), within_s=20)
            is_there = (batch.run() / "plan.json").exists()
            words = ["resume", "r"] if is_there else words
        else:
            assert process.returncode == 0, output
            return killed


def dense(batch: Batch, size: int) -> None:
    """Fill the disks of a batch."""
    noise = random.Random(7)
    for disk in (disk for disks in batch.disks.values() for disk in disks):
        disk.write_bytes(noise.randbytes(size))


def run_with_kills(
    folder: Path, *, guests: int, size: int, kills: int, seed: int, longest_s: float = 4.5
) -> Outcome:
    """Convert guests, killing the supervisor ``kills`` times; fewer when the run ends before.

    Everything that is copied is read; so is what proves that a checkpoint holds.
    """
    batch = Batch(folder, guests)
    dense(batch, size)
    batch.remember_sources()
    total = sum(len(disks) for disks in batch.disks.values()) * size
    chance = random.Random(seed)
    moments = [chance.uniform(_FIRST_S, longest_s) for _ in range(kills)]
    rate = int(total / (sum(moments) * _LONGER))
    with counted_sources(batch) as notes:
        batch.write_plan(
            f"[limits]\nconversions = 2\ndisks = 4\nbandwidth = {rate}\n[retries]\nattempts = 2\n"
        )
        killed = kill_often(batch, moments)
        batch.assert_converted(*batch.disks)
        assert set(batch.phases().values()) == {"done"}
        batch.assert_nothing_left(*batch.disks)
        return Outcome(killed, bytes_read(notes) / total)


@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_moments(short_tmp: Path, seed: int) -> None:
    # Three seconds are enough to be in any step: the copies begin in the second one.
    outcome = run_with_kills(short_tmp, guests=3, size=24 * MIB, kills=5, seed=seed, longest_s=3.0)
    assert outcome.kills == 5, "it had ended before it was killed so often"
    assert outcome.read_ratio < 1.5, "most of what had landed was copied again"


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (Outcome(5, 1.1), 0, "5 kills"),
        (Outcome(3, 1.1), 1, "after 3 of 5 kills"),
        (Outcome(5, 1.3), 1, "BROKEN"),
    ],
)
def test_the_benchmark_tells_of_the_real_kills(
    outcome: Outcome, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "benchmarks" / "batch_kills.py"
    spec = importlib.util.spec_from_file_location("batch_kills", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.told(outcome, wanted=5, seed=1) == status
    told = capsys.readouterr()
    assert words in told.out + told.err
    assert f"{outcome.kills} kills, all" in told.out
