#!/usr/bin/env python3
"""Measure 8 disks of 2 guests at once on the engine of a batch, beside one run of all 8 disks.

    .venv/bin/python benchmarks/batch_engine.py [--mib 512] [--rounds 5] [--scratch /dev/shm]

Both copy the same disks between servers of their own, in turn, with the order changing each round.
A ratio is that of one round, since within it both met about the same machine; the median counts.
``--connections`` is what a batch gives each disk. ``near`` copies from and to files, ``null`` to
nowhere, ``slow`` from sources that take 20 ms for an answer.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.servers import serve
from v2v_async.copy.endpoint import nbd
from v2v_async.copy.engine import Engine, EngineLimits, copy_engine
from v2v_async.copy.schedule import CopyJob, copy_disks
from v2v_async.events import Reporter
from v2v_async.options import CopyOptions
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

MIB = 1 << 20
GUESTS, DISKS = 2, 4
OPTIONS = CopyOptions(flush=False)
WANTED = 1.0
"""How much longer the batch's engine may take than one run, but for noise: not at all."""
NOISE = 0.1

Copier = Callable[[Sequence[CopyJob]], Awaitable[None]]


async def by_one_run(jobs: Sequence[CopyJob]) -> None:
    await copy_disks(jobs, quiet(), OPTIONS)


def by_engine(limits: EngineLimits, connections: int) -> Copier:
    async def copy(jobs: Sequence[CopyJob]) -> None:
        async def one(engine: Engine, job: CopyJob, guest: int) -> None:
            place = CopyJob(job.index, job.source, job.target, job.is_known_zero, connections)
            await engine.copy(place, OPTIONS, quiet(), groups=(f"guest {guest}",))

        async with copy_engine(limits) as engine, anyio.create_task_group() as group:
            for at, job in enumerate(jobs):
                group.start_soon(one, engine, job, at // DISKS)

    return copy


async def measure(folder: Path, disks: Sequence[Path], scenario: str, copy: Copier) -> float:
    """Return the seconds of one copy of all disks, between servers of its own."""
    targets = [folder / f"t{at}" for at in range(len(disks))]
    try:
        async with running_servers(V2VDir(folder)) as servers:
            jobs = []
            for at, (disk, target) in enumerate(zip(disks, targets, strict=True)):
                filters = ("delay",) if scenario == "slow" else ()
                delay = ("rdelay=20ms",) if scenario == "slow" else ()
                words = (f"file={disk}", *delay)
                one = await serve(
                    servers, f"in{at}", folder, "file", *words, filters=filters, read_only=True
                )
                if scenario == "near":
                    with target.open("wb") as file:
                        file.truncate(disk.stat().st_size)
                    two = await serve(servers, f"out{at}", folder, "file", f"file={target}")
                else:
                    size = f"size={disk.stat().st_size}"
                    two = await serve(servers, f"out{at}", folder, "null", size)
                jobs.append(CopyJob(at + 1, nbd(one.endpoint), nbd(two.endpoint), True))
            began = time.perf_counter()
            await copy(jobs)
            return time.perf_counter() - began
    finally:
        for target in targets:
            target.unlink(missing_ok=True)


async def compare(folder: Path, disks: Sequence[Path], options: argparse.Namespace) -> bool:
    limits = EngineLimits(
        bytes_in_flight=512 * MIB, max_connections=64, threads=options.threads or None
    )
    ways = {"run": by_one_run, "engine": by_engine(limits, options.connections)}
    is_kept = True
    print("scenario  one run  engine  engine/run  worst")
    for scenario in options.scenario:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.rounds):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            for name in order:
                times[name].append(await measure(folder, disks, scenario, ways[name]))
        ratios = [two / one for one, two in zip(times["run"], times["engine"], strict=True)]
        ratio = statistics.median(ratios)
        is_kept = is_kept and ratio <= WANTED + NOISE
        run_s, engine_s = (statistics.median(times[name]) for name in ("run", "engine"))
        print(f"{scenario:8}  {run_s:6.2f}s {engine_s:6.2f}s  {ratio:10.2f}  {max(ratios):5.2f}")
    print(f"wanted: engine/run at most {WANTED:g} (and {NOISE:.0%} of noise)")
    return is_kept


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512, metavar="N", help="size of each disk")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--connections", type=int, default=4, metavar="N")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: by processors")
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"), metavar="DIR")
    parser.add_argument(
        "--scenario", action="append", choices=("near", "null", "slow"), metavar="NAME"
    )
    options = parser.parse_args()
    options.scenario = options.scenario or ["near", "null", "slow"]
    folder = Path(tempfile.mkdtemp(prefix="be.", dir=options.scratch))
    try:
        disks = [folder / f"s{at}" for at in range(GUESTS * DISKS)]
        noise = random.Random(1).randbytes(16 * MIB)
        for disk in disks:
            with disk.open("wb") as file:
                for _ in range(options.mib // 16):
                    file.write(noise)
        print(f"{os.cpu_count()} processors, {len(disks)} disks of {options.mib} MiB")
        return 0 if anyio.run(compare, folder, disks, options) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def quiet() -> Reporter:
    return Reporter(lambda event: None, "bench")


if __name__ == "__main__":
    sys.exit(main())
