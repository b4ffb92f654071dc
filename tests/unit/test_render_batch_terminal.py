"""A whole batch on a terminal: what scrolls up, of evil names, and terminals that fail."""

from __future__ import annotations

import io
import os
import re
import select

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.batch_screens import GIB, SIZES, screen_of, whole_batch
from tests.small_terminal import Resizable
from tests.unit.test_render_batch_state import EVENTS, Batch
from v2v_async.events import Bytes, Event
from v2v_async.render import live_part
from v2v_async.render.batch_plain import BatchPlain
from v2v_async.render.batch_terminal import BatchTerminal
from v2v_async.render.broadcast import Broadcast


@pytest.mark.parametrize(("width", "height"), SIZES[:5])
def test_a_whole_batch_scrolls_up_and_leaves_nothing_live(width: int, height: int) -> None:
    terminal = screen_of(whole_batch(12), width, height)
    shown = "\n".join(terminal.shown)
    if width >= 80:
        ended = re.findall(r"^[✓✗] guest-\d+ +(done|failed)", shown, re.MULTILINE)
        assert len(ended) == 12
    assert shown.count("no KVM here") <= 1  # not once for each guest
    assert "waiting:" not in shown
    assert re.search(r"^✓ batch", shown, re.MULTILINE)


def test_a_terminal_that_is_resized_in_between() -> None:
    for small, large in (((40, 10), (200, 50)), ((200, 50), (40, 10)), ((80, 24), (20, 4))):
        terminal = screen_of(whole_batch(6), *small, resize_to=large)
        assert re.search(r"^✓ batch", "\n".join(terminal.shown), re.MULTILINE)


def test_a_failure_is_told_with_what_to_do() -> None:
    batch = Batch().begin("a" * 60, "b")
    batch.start("a" * 60)
    batch.emit("a" * 60, "failed", "it is\nbroken", hint="mend it", log="/v/log",
               details={"step": "copy", "disk": 3})  # fmt: skip
    shown = "\n".join(screen_of(batch.events, 80, 24).shown)
    assert re.search(r"✗ a{60}: failed: copy,", shown)
    assert "hint: mend it" in shown
    assert "log: /v/log" in shown


EVIL = "x\x1b[2J\x1b]0;owned\x07\r\n\u202egpj"


def test_evil_names_and_texts_are_clean_everywhere() -> None:
    batch = Batch()
    batch.run.emit("started", details={"batch": EVIL})
    guest = batch.run.for_guest(EVIL)
    guest.emit("planned", details={"disks": [GIB, GIB], "phase": "waiting", "group": EVIL})
    guest.emit("waiting", details={"for": EVIL, "until": None})
    batch.run.emit("limits", details={"taken": {EVIL: 1}, "capacities": {EVIL: 1}})
    guest.emit("started", details={"attempt": 1})
    guest.for_step(EVIL).emit("started")
    guest.for_step("convert").warning(EVIL)
    guest.emit("converted")
    guest.for_disk(1).emit("waiting", details={"for": EVIL})
    guest.for_step("copy").for_disk(2).emit("progress", bytes=Bytes(total=9, data=9))
    guest.emit("retrying", EVIL, hint=EVIL, details={"at": batch.now + 9})
    guest.emit("failed", EVIL, hint=EVIL, log=EVIL, details={"step": EVIL, "bundle": EVIL})
    console = Resizable(120, 30)
    written: list[str] = []
    with BatchTerminal(console, clock=lambda: batch.now, is_animated=False) as terminal:
        plain = BatchPlain(written.append, verbose=True)
        for event in batch.events:
            terminal(event)
            plain(event)
            for key in ("f", "f"):
                terminal._view.press(key)
                terminal._live.draw()
            assert isinstance(console.file, io.StringIO)
            sent = console.file.getvalue()
            console.read()
            # What is left without the sequences that are ours.
            left = re.sub(r"\x1b\[[0-9;]*[AJKm]", "", sent.replace("\x1b[2J", "EVIL"))
            assert not re.search("[\x1b\x07\u202e]|EVIL", left)
    for line in written:
        assert line.count("\n") == 1
        assert not re.search("[\x1b\x07\r\u202e]", line)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS, size=st.sampled_from(SIZES[:5]))
def test_no_order_of_events_breaks_the_screens(events: list[Event], size: tuple[int, int]) -> None:
    written: list[str] = []
    plain = BatchPlain(written.append, verbose=True)
    for event in events:
        plain(event)
    screen_of(events, *size)
    for line in written:
        assert line.endswith("\n")
        assert not re.search("[\x1b\x07\r]", line)


# Terminals that fail.


class Gone(io.StringIO):
    """A terminal whose line was cut."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_has_gone_is_told_once_and_the_run_goes_on() -> None:
    kept: list[Event] = []

    class Kept:
        name = "kept"

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def __call__(self, event: Event) -> None:
            kept.append(event)

    console = Console(file=Gone(), width=80, height=24, force_terminal=True)
    terminal = BatchTerminal(console)
    batch = Batch()
    with Broadcast([terminal, Kept()]) as broadcast:
        assert terminal._live._thread is not None
        terminal._live._thread.join(10)  # the first drawing failed
        assert not terminal._live._thread.is_alive()
        batch.begin("a", "b")
        for name in "ab":
            batch.emit(name, "cancelled")
        for event in batch.events:
            broadcast(event)
    warnings = [event.text for event in kept if event.type == "warning"]
    assert warnings == [
        "screen: Input/output error; nothing more is written there, and the run goes on"
    ]
    assert len(kept) == len(batch.events) + 1


def test_a_terminal_that_takes_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_part, "_JOIN_TIMEOUT_S", 0.2)
    master, slave = os.openpty()
    file = os.fdopen(slave, "w", encoding="utf-8")
    events = whole_batch(12) * 20
    try:
        with BatchTerminal(Console(file=file, force_terminal=True)) as terminal:
            for event in events:
                terminal(event)  # nobody reads the other side, which has room for some kilobytes
            assert terminal._live._thread is not None
            thread = terminal._live._thread
        assert thread.is_alive()
        while thread.is_alive():
            if select.select([master], [], [], 0.05)[0]:
                os.read(master, 65536)
    finally:
        file.close()
        os.close(master)
