"""How long a guest takes whose disk is copied while it is converted, beside one after the other.

    .venv/bin/python benchmarks/overlap.py [--rounds N] [--size MIB] [--rate MIB] [--convert S]

The source is an NBD server of limited rate (nbdkit's rate filter). The conversion is replayed, so
that it takes as long as it is told to; it writes to the disk before that time. Fails when the
median wall time, less what the other steps take, is over 1.15 × the longer of converting and
copying, as they take one after the other, plus what the changed bytes take at that rate; and when
the two results differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 1.15
MIB = 1 << 20
_BLOCK = 4096


@dataclass(frozen=True)
class Run:
    """Seconds, and bytes copied in vain."""

    wall: float
    convert: float
    copy: float
    wasted: int


def main() -> int:
    """Measure, print a table, and say whether the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="all of it is data")
    parser.add_argument("--rate", type=int, default=32, metavar="MIB", help="a second")
    parser.add_argument("--convert", type=float, default=16.0, metavar="S")
    arguments = parser.parse_args()
    runs: dict[str, list[Run]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory(prefix="vb.", dir="/var/tmp") as name:
        folder = Path(name)
        disk = folder / "disk.img"
        noise = random.Random(1)
        with disk.open("wb") as file:
            for _ in range(arguments.size):
                file.write(noise.randbytes(MIB))
        for round_ in range(arguments.rounds):
            order = list(runs)
            for mode in order if round_ % 2 == 0 else reversed(order):
                run = one_run(folder, disk, mode, arguments)
                runs[mode].append(run)
                print(
                    f"round {round_ + 1}: --overlap={mode:3}  wall {run.wall:6.1f} s  "
                    f"convert {run.convert:6.1f} s  copy {run.copy:6.1f} s  "
                    f"in vain {run.wasted / MIB:.1f} MiB",
                    flush=True,
                )
        changed = difference(folder / "off-sda", folder / "on-sda", disk)
    off, on = (
        Run(*(statistics.median(values) for values in zip(*map(fields, runs[mode]), strict=True)))
        for mode in runs
    )
    delta = changed / (arguments.rate * MIB)
    others = max(0.0, off.wall - off.convert - off.copy)
    bound = ALLOWED * max(off.convert, off.copy) + delta
    is_kept = on.wall - others <= bound
    print(f"one after the other {off.wall:.1f} s, overlapped {on.wall:.1f} s")
    print(
        f"{on.wall:.1f} s - {others:.1f} s for other steps <= {ALLOWED} x max({off.convert:.1f}, "
        f"{off.copy:.1f}) + {delta:.1f} s for {changed / MIB:.1f} MiB = {bound:.1f} s: "
        f"{'kept' if is_kept else 'BROKEN'}"
    )
    return 0 if is_kept else 1


def one_run(folder: Path, disk: Path, mode: str, arguments: argparse.Namespace) -> Run:
    """Convert the guest once, by the command."""
    socket, events = folder / "sock", folder / "events"
    events.unlink(missing_ok=True)
    serve = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=rate", "file", str(disk)]
    server = subprocess.Popen([*serve, f"rate={arguments.rate * MIB * 8}"])
    try:
        while not socket.exists():
            time.sleep(0.01)
        environment = {
            **os.environ,
            "PATH": f"{ROOT / 'tests' / 'fault' / 'replay'}:{os.environ['PATH']}",
            "V2V_REPLAY_STIRS": "100",
            "V2V_REPLAY_HANGS_S": str(arguments.convert),
            "LIBGUESTFS_HV": "qemu-system-x86_64",
        }
        argv = [str(Path(sys.executable).parent / "virt-v2v-async"), "-i", "disk"]
        argv += [f"nbd+unix:///?socket={socket}", "-io", "overlay=kept", "-o", "local"]
        argv += ["-os", str(folder), "-on", mode, f"--overlap={mode}", f"--events={events}"]
        began = time.monotonic()
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        wall = time.monotonic() - began
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    told = [json.loads(line) for line in events.read_text().splitlines()]
    ends = [each for each in told if each["type"] == "finished"]
    lasted = {each["step"]: each["duration_s"] for each in ends if "step" in each}
    wasted = sum(each["bytes"]["wasted"] for each in ends if "disk" in each)
    return Run(wall, lasted["convert"], lasted["copy"], wasted)


def fields(run: Run) -> tuple[float, ...]:
    """Return the values of a run in the order of its fields."""
    return run.wall, run.convert, run.copy, run.wasted


def difference(one: Path, other: Path, source: Path) -> int:
    """Return how many bytes the conversion changed, by blocks; the two results must be equal."""
    changed = 0
    with one.open("rb") as left, other.open("rb") as right, source.open("rb") as before:
        while block := before.read(MIB):
            made = left.read(MIB)
            if made != right.read(MIB):
                raise SystemExit("the two results differ")
            if made != block:
                changed += sum(
                    _BLOCK
                    for at in range(0, len(block), _BLOCK)
                    if made[at : at + _BLOCK] != block[at : at + _BLOCK]
                )
    return changed


if __name__ == "__main__":
    sys.exit(main())
