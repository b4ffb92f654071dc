"""Screens of made-up batches, as a person sees them."""

from __future__ import annotations

from typing import Any

from tests.batch_events import PretendedBatch
from tests.small_terminal import Resizable, SmallTerminal
from tests.unit.test_render_batch_state import BEGAN, Batch
from v2v_async.events import Event
from v2v_async.render.batch_state import BatchState
from v2v_async.render.batch_terminal import BatchTerminal
from v2v_async.render.line import Line

GIB = 1 << 30
SIZES = [(80, 24), (200, 50), (40, 10), (64, 16), (20, 5), (10, 3), (3, 1)]


def text(lines: list[Line]) -> list[str]:
    return ["".join(piece for piece, _ in line).rstrip() for line in lines]


def busy(guests: int = 60, seconds: int = 300, failing: float = 0.2) -> tuple[BatchState, float]:
    state = BatchState()
    batch = PretendedBatch(state.apply, guests=guests, failing=failing, progress_every_s=1.0)
    batch.begin()
    for _ in range(seconds):
        batch.go_on_to(batch.now + 1)
    return state, batch.now


def whole_batch(guests: int, **options: Any) -> list[Event]:
    events: list[Event] = []
    batch = PretendedBatch(
        events.append, guests=guests, began=BEGAN, progress_every_s=5.0, **options,
    )  # fmt: skip
    batch.begin()
    while not batch.is_over:
        batch.go_on_to(batch.now + 2)
    batch.go_on_to(batch.now + 1)
    return events


def pausing() -> Batch:
    """Return six guests of which four are paused, each elsewhere."""
    batch = Batch().begin("web", "db", "mail", "dns", "old", "new", disks=(4 * GIB, 2 * GIB))
    for name in ("web", "db"):
        batch.convert(name, 60)
    batch.disk("web", "started", 1, total=8 * GIB, data=4 * GIB)
    batch.start("old")
    batch.run.for_guest("old").for_step("convert").emit("started")
    for second in range(1, 8):
        batch.now += 1
        batch.disk("web", "progress", 1, total=8 * GIB, data=4 * GIB, copied=second * GIB // 10)
    for name in ("web", "db", "mail", "old"):
        batch.emit(name, "paused")
    for name, disk in (("web", 2), ("db", 1), ("db", 2)):
        paused = {"for": "paused", "until": None}
        batch.run.for_guest(name).for_disk(disk).emit("waiting", details=paused)
    return batch


def screen_of(
    events: list[Event], width: int, height: int, *, resize_to: tuple[int, int] | None = None
) -> SmallTerminal:
    """Return a terminal after a batch was shown on it, drawn after each event."""
    console = Resizable(width, height)
    now = BEGAN
    terminal = BatchTerminal(console, clock=lambda: now, is_animated=False)
    with terminal:
        for number, event in enumerate(events):
            now = max(now, event.time)
            if resize_to is not None and number == len(events) // 2:
                console.read()
                console.width, console.height = resize_to
                fresh = SmallTerminal(*resize_to)
                console.terminal = fresh
            terminal(event)
            terminal._live.draw()
            assert "could not be drawn" not in "\n".join(console.read().shown)
    return console.read()
