"""The events of a batch that is not there: what its screens are shown, and how fast.

    .venv/bin/python -m tests.batch_events [--guests 60] [--speed 10] [--plain | --follow]

Time is given from outside, so that a test goes through an hour in no time. Guests convert under a
limit, their disks are copied under another; some fail, some are tried again.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from v2v_async.events import Bytes, Emit, Reporter

GIB = 1 << 30
MIB = 1 << 20


@dataclass
class _Guest:
    name: str
    reporter: Reporter
    sizes: list[int]
    fate: str
    seconds: float
    attempt: int = 0
    converted_at: float = 0.0
    not_before: float = 0.0
    is_converted: bool = False
    copied: dict[int, float] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)


class PretendedBatch:
    """Emits what a supervisor would, each time :meth:`go_on_to` is called."""

    def __init__(
        self,
        emit: Emit,
        *,
        guests: int = 60,
        disks: int = 3,
        conversions: int = 2,
        copies: int = 24,
        conversion_s: float = 60.0,
        rate: int = 40 * MIB,
        disk_size: int = 8 * GIB,
        progress_every_s: float = 0.1,
        failing: float = 0.05,
        began: float = 1_700_000_000.0,
        names: Callable[[int], str] = lambda number: f"guest-{number:03}",
    ) -> None:
        self.now = began
        self._random = random.Random(guests)
        self.run = Reporter(emit, "r", clock=lambda: self.now)
        self._limits = conversions, copies
        self._rate, self._every_s = rate, progress_every_s
        self._next_progress = began
        self._told: dict[object, object] = {}
        self._waiting: list[_Guest] = []
        self._converting: list[_Guest] = []
        self._copying: list[_Guest] = []
        self.done = self.failed = 0
        self.count = guests
        choose = self._random
        for number in range(guests):
            name = names(number)
            sizes = [int(disk_size * choose.uniform(0.3, 1)) for _ in range(disks)]
            luck = choose.random()
            fate = "fails" if luck < failing else "again" if luck < 2 * failing else "done"
            seconds = conversion_s * choose.uniform(0.7, 1.3)
            self._waiting.append(_Guest(name, self.run.for_guest(name), sizes, fate, seconds))

    def begin(self) -> None:
        """Emit what a supervisor says first."""
        self.run.emit("started", details={"batch": "nightly", "guests": self.count})
        for guest in self._waiting:
            details = {"disks": guest.sizes, "phase": "waiting", "priority": 0, "group": None}
            guest.reporter.emit("planned", details=details)

    @property
    def is_over(self) -> bool:
        """Whether every guest has ended."""
        return not (self._waiting or self._converting or self._copying)

    def convert_no_more(self) -> None:
        """Begin no more conversions."""
        self._limits = 0, self._limits[1]

    def go_on_to(self, now: float) -> None:
        """Emit what has happened until then."""
        seconds, self.now = now - self.now, now
        for guest in list(self._converting):
            if now >= guest.converted_at:
                self._converted(guest)
        is_due = now >= self._next_progress
        if is_due:
            self._next_progress = now + self._every_s
        for guest in list(self._copying):
            self._copy(guest, seconds, is_due=is_due)
        for guest in list(self._waiting):
            if len(self._converting) >= self._limits[0]:
                break
            if guest.not_before <= now:
                self._start(guest)
        self._tell()
        if self.is_over and "run" not in self._told:
            self._told["run"] = True
            self.run.emit("finished", details={"done": self.done, "failed": self.failed})

    def _start(self, guest: _Guest) -> None:
        self._waiting.remove(guest)
        guest.attempt += 1
        guest.reporter.emit("started", details={"attempt": guest.attempt})
        if guest.is_converted:
            guest.reporter.emit("converted")
            self._copying.append(guest)
            return
        self._converting.append(guest)
        guest.converted_at = self.now + guest.seconds
        guest.reporter.for_step("input").emit("started")
        guest.reporter.for_step("input").emit("finished")
        guest.reporter.for_step("convert").emit("started")

    def _converted(self, guest: _Guest) -> None:
        self._converting.remove(guest)
        guest.reporter.for_step("convert").emit("finished")
        guest.reporter.for_step("convert").warning("no KVM here: emulated, which is slower")
        guest.is_converted = True
        guest.reporter.emit("converted")
        self._copying.append(guest)

    def _copy(self, guest: _Guest, seconds: float, *, is_due: bool) -> None:
        running = sum(len(each.started) for each in self._copying)
        for number, size in enumerate(guest.sizes, 1):
            disk = guest.reporter.for_step("copy").for_disk(number)
            total = size * 2
            if number not in guest.started and guest.copied.get(number, 0) < size:
                if running >= self._limits[1]:
                    continue
                running += 1
                guest.started.add(number)
                guest.copied[number] = 0
                disk.emit("planned", bytes=Bytes(total=total, data=size))
                disk.emit("started", bytes=Bytes(total=total, data=size))
            if number not in guest.started:
                continue
            copied = guest.copied[number] + seconds * self._rate * self._random.uniform(0.8, 1.2)
            copied = guest.copied[number] = min(copied, size)
            if guest.fate != "done" and copied > size / 2:
                self._fail(guest, number)
                return
            state = Bytes(total=total, data=size, copied=int(copied), skipped=total - size)
            if copied >= size:
                guest.started.remove(number)
                disk.emit("finished", bytes=state)
            elif is_due:
                disk.emit("progress", bytes=state)
        if not guest.started and all(
            guest.copied.get(n, 0) >= s for n, s in enumerate(guest.sizes, 1)
        ):
            self._copying.remove(guest)
            guest.reporter.for_step("finalize").emit("started")
            guest.reporter.for_step("finalize").emit("finished")
            guest.reporter.emit("finished")
            self.done += 1

    def _fail(self, guest: _Guest, disk: int) -> None:
        self._copying.remove(guest)
        guest.started.clear()
        reason = "read of 256 KiB at 3 GiB: the server esx1.example.com has gone"
        hint = "is the host up? the log has what the server said"
        guest.reporter.for_step("copy").for_disk(disk).emit("failed", reason)
        if guest.fate == "again":
            guest.fate = "done"
            guest.copied.clear()
            guest.not_before = self.now + 30
            self._waiting.append(guest)
            text = f"attempt 1 of 3 failed: {reason}; the next begins in 30 s"
            details = {"attempt": 1, "at": guest.not_before}
            guest.reporter.emit("retrying", text, hint=hint, details=details)
            return
        self.failed += 1
        log = f"/var/tmp/v2v-async/nightly/{guest.name}/log/copy-{disk}.log"
        where = {"step": "copy", "disk": disk, "permanent": False, "bundle": None}
        guest.reporter.emit("failed", reason, hint=hint, log=log, offset=3 * GIB, details=where)

    def _tell(self) -> None:
        """Say what waits for what, where that is new."""
        for guest in self._waiting:
            is_later = guest.not_before > self.now
            reason = ("time", guest.not_before) if is_later else ("conversions", None)
            if self._told.get(guest.name) != reason:
                self._told[guest.name] = reason
                details = {"for": reason[0], "until": reason[1]}
                guest.reporter.emit("waiting", details=details)
        for guest in self._copying:
            for number in range(1, len(guest.sizes) + 1):
                is_waiting = number not in guest.started and number not in guest.copied
                key = guest.name, number, guest.attempt
                if is_waiting and key not in self._told:
                    self._told[key] = True
                    guest.reporter.for_disk(number).emit(
                        "waiting", details={"for": "disks", "until": None}
                    )
        copies, conversions = sum(len(g.started) for g in self._copying), len(self._converting)
        limits = {
            "conversions": (conversions, self._limits[0]),
            "memory": (conversions * 2 * GIB, 8 * GIB),
            "disks": (copies, self._limits[1]),
            "connections": (4 * copies, 4 * self._limits[1]),
            "hosts.esx1.connections": (2 * copies, 64),
        }
        taken = {name: amount for name, (amount, _) in limits.items()}
        capacities = {name: most for name, (_, most) in limits.items()}
        if self._told.get("limits") != taken:
            self._told["limits"] = taken
            self.run.emit("limits", details={"taken": taken, "capacities": capacities})


def main() -> int:
    """Show it."""
    from rich.console import Console

    from v2v_async.render.batch_plain import BatchPlain
    from v2v_async.render.batch_terminal import BatchTerminal, keyboard_of_stdin

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=60)
    parser.add_argument("--disks", type=int, default=3)
    parser.add_argument("--copies", type=int, default=24)
    parser.add_argument("--conversions", type=int, default=2)
    parser.add_argument("--conversion-s", type=float, default=60.0)
    parser.add_argument("--failing", type=float, default=0.05)
    parser.add_argument("--speed", type=float, default=10.0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--follow", action="store_true")
    options = parser.parse_args()
    began = time.time()
    has_left = threading.Event()
    renderer: BatchPlain | BatchTerminal
    batch: PretendedBatch
    if options.plain:
        renderer = BatchPlain(sys.stdout.write)
    else:
        renderer = BatchTerminal(
            Console(),
            keyboard=keyboard_of_stdin(),
            on_leave=has_left.set if options.follow else None,
            clock=lambda: batch.now,
        )
    batch = PretendedBatch(
        renderer,
        guests=options.guests,
        disks=options.disks,
        copies=options.copies,
        conversions=options.conversions,
        conversion_s=options.conversion_s,
        failing=options.failing,
        progress_every_s=0.1 * options.speed,
        began=began,
    )
    try:
        with renderer:
            batch.begin()
            while not batch.is_over and not has_left.is_set():
                until = began + (time.time() - began) * options.speed
                while batch.now < until - 0.2:
                    batch.go_on_to(batch.now + 0.2)
                batch.go_on_to(until)
                time.sleep(0.05)  # real time goes by: this is a demonstration
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
