#!/usr/bin/env python3
"""What the live view of a large batch costs of one core.

    .venv/bin/python benchmarks/batch_screen.py [--guests 500] [--seconds 20] [--rows 24]

The view runs in this process and draws on a pseudo-terminal, which a child reads empty. Eight
guests copy three disks each, and each disk tells of its progress ten times a second. The figure is
all processor time of the process, in which making the events is included; what that is alone is
measured too, and said.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from tests.batch_events import GIB, PretendedBatch
from v2v_async.events import Event
from v2v_async.render.batch_terminal import BatchTerminal

_WANTED = 0.05
_ACTIVE, _DISKS = 8, 3
_TICK_S = 0.1  # ten progress events a second of each disk


def main() -> int:
    """Measure, print, and say whether the promise is kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, default=500, metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="N")
    parser.add_argument("--rows", type=int, default=24, metavar="N")
    parser.add_argument("--columns", type=int, default=80, metavar="N")
    options = parser.parse_args()
    terminal, said = _terminal(options.rows, options.columns)
    count = 0

    def nothing(event: Event) -> None:
        nonlocal count
        count += 1

    alone = _share(nothing, options.guests, options.seconds / 4)
    count = 0
    with os.fdopen(terminal, "w", encoding="utf-8") as file:
        console = Console(file=file, color_system="256", force_terminal=True)
        with BatchTerminal(console) as screen:

            def show(event: Event) -> None:
                nonlocal count
                count += 1
                screen(event)

            share = _share(show, options.guests, options.seconds)
    os.wait()
    drawn = int(os.read(said, 64))
    print(f"guests              {options.guests}")
    print(f"terminal            {options.columns}x{options.rows}")
    print(f"events a second     {count / options.seconds:.0f}")
    print(f"drawn               {drawn / options.seconds / 1000:.1f} kB a second")
    print(f"of one core         {share:.2%} (wanted: under {_WANTED:.0%})")
    print(f"making the events   {alone:.2%} of one core, included above")
    return 0 if share < _WANTED and drawn > 0 else 1


def _share(emit: Callable[[Event], None], guests: int, seconds: float) -> float:
    """Run a batch in real time; return the share of one core that this process takes."""
    began = time.time()
    batch = PretendedBatch(
        emit,
        guests=guests,
        disks=_DISKS,
        conversions=_ACTIVE,
        copies=_ACTIVE * _DISKS,
        conversion_s=0.01,
        disk_size=1 << 50,  # it does not end while we look
        rate=GIB // 8,
        progress_every_s=_TICK_S,
        failing=0.0,
        began=began,
    )
    batch.begin()
    # Eight guests are converted; all others wait for a conversion.
    batch.go_on_to(began + 0.01)
    batch.convert_no_more()
    time.sleep(1.0)  # the first drawing, and imports on the way to it, are not what is measured
    cpu, wall = time.process_time(), time.monotonic()
    next_tick = wall
    while time.monotonic() - wall < seconds:
        batch.go_on_to(time.time())
        next_tick += _TICK_S
        time.sleep(max(next_tick - time.monotonic(), 0))  # the batch goes on in real time
    return (time.process_time() - cpu) / (time.monotonic() - wall)


def _terminal(rows: int, columns: int) -> tuple[int, int]:
    """Return a pseudo-terminal, and a pipe that says in the end how many bytes were drawn on it."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    said, say = os.pipe()
    if os.fork() == 0:
        os.close(slave)
        drawn = 0
        try:
            while received := os.read(master, 65536):
                drawn += len(received)
        except OSError:  # the other side was closed
            pass
        os.write(say, str(drawn).encode())
        os._exit(0)
    os.close(master)
    os.close(say)
    return slave, said


if __name__ == "__main__":
    sys.exit(main())
