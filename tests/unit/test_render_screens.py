"""A scripted run through each renderer: what a person or program reads."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.segment import Segment

from v2v_async.events import Bytes, Event, Reporter
from v2v_async.render.jsonl import JsonLines
from v2v_async.render.machine import Machine, message_line
from v2v_async.render.plain import Plain
from v2v_async.render.terminal import Terminal
from v2v_async.render.text import clean

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
SIZES = {1: (1000 * MIB, 100 * MIB), 2: (500 * MIB, 500 * MIB)}


class Script:
    """The events of one guest with two disks, up to an ending."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now = 1_700_000_000.0
        self.run = Reporter(self.events.append, "r", clock=lambda: self.now)
        self.guest = self.run.for_guest("debian12\x1b[31m")

    def until_half(self) -> Script:
        self.run.emit("started")
        self.guest.emit("started")
        convert = self.guest.for_step("convert")
        convert.emit("started")
        self.now += 2
        convert.warning("careful\x1b]0;owned\x07")
        convert.debug("i_root = /dev/sda1")
        self.now += 1
        convert.emit("finished")
        self.copy = self.guest.for_step("copy")
        self.copy.emit("started")
        for index, (total, data) in SIZES.items():
            self.copy.for_disk(index).emit("planned", bytes=Bytes(total=total, data=data))
        self.progress(1, 2)
        return self

    def progress(self, first: int, last: int, parts: int = 4) -> None:
        for part in range(first, last + 1):
            self.now += 2
            for index, (total, data) in SIZES.items():
                copied = data * part // parts
                state = Bytes(total=total, data=data, copied=copied)
                self.copy.for_disk(index).emit("progress", bytes=state)

    def to_the_end(self) -> Script:
        self.progress(3, 4)
        for index, (total, data) in SIZES.items():
            done = Bytes(total=total, data=data, copied=data, skipped=total - data)
            self.copy.for_disk(index).emit("finished", bytes=done)
        self.copy.emit("finished")
        self.guest.emit("finished")
        self.run.emit("finished")
        return self

    def to_failure(self, type_: str) -> Script:
        for reporter in (self.copy.for_disk(2), self.copy, self.guest, self.run):
            reporter.emit("failed" if type_ == "failed" else "cancelled", "no luck")
        return self


def plain(events: list[Event], *, quiet: bool = False, verbose: bool = False) -> tuple[str, str]:
    out, warnings = io.StringIO(), io.StringIO()
    with Plain(out.write, warnings.write, quiet=quiet, verbose=verbose) as renderer:
        for event in events:
            renderer(event)
    return out.getvalue(), warnings.getvalue()


def test_plain() -> None:
    out, warnings = plain(Script().until_half().to_the_end().events)
    assert warnings == "v2v-async: warning: convert: careful�]0;owned�\n"
    assert out.splitlines() == [
        "[   0.0] Converting the guest",
        "[   3.0] convert done after 3.0 s",
        "[   3.0] Copying the disks",
        "[   5.0] disk 1:  25%  25.0 MiB of 100 MiB, 12.5 MiB/s, 0:06 left",
        "[   5.0] disk 2:  25%  125 MiB of 500 MiB, 62.5 MiB/s, 0:06 left",
        "[   7.0] disk 1:  50%  50.0 MiB of 100 MiB, 12.5 MiB/s, 0:04 left",
        "[   7.0] disk 2:  50%  250 MiB of 500 MiB, 62.5 MiB/s, 0:04 left",
        "[   9.0] disk 1:  75%  75.0 MiB of 100 MiB, 12.5 MiB/s, 0:02 left",
        "[   9.0] disk 2:  75%  375 MiB of 500 MiB, 62.5 MiB/s, 0:02 left",
        "[  11.0] disk 1:  99%  100 MiB of 100 MiB, 12.5 MiB/s, 0:00 left",
        "[  11.0] disk 2:  99%  500 MiB of 500 MiB, 62.5 MiB/s, 0:00 left",
        "[  11.0] copy, disk 1: 100 MiB copied, 900 MiB zero, in 8.0 s (12.5 MiB/s)",
        "[  11.0] copy, disk 2: 500 MiB copied, in 8.0 s (62.5 MiB/s)",
        "[  11.0] copy done after 8.0 s",
        "[  11.0] all done after 0:11",
    ]


def test_plain_quiet_and_verbose() -> None:
    events = Script().until_half().to_the_end().events
    out, warnings = plain(events, quiet=True)
    assert out == ""
    assert "careful" in warnings
    assert "i_root" in plain(events, verbose=True)[0]
    assert "i_root" not in plain(events)[0]


def test_plain_progress_is_rate_limited() -> None:
    script = Script().until_half()
    lines = len(plain(script.events)[0].splitlines())
    for copied in range(250, 300):  # 10 MiB in 0.5 s
        script.now += 0.01
        state = Bytes(total=500 * MIB, data=500 * MIB, copied=copied * MIB)
        script.copy.for_disk(2).emit("progress", bytes=state)
    assert len(plain(script.events)[0].splitlines()) == lines
    script.now += 10
    script.copy.for_disk(2).emit("progress", bytes=state)
    assert len(plain(script.events)[0].splitlines()) == lines + 1


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_a_run_that_failed_is_never_whole(ending: str) -> None:
    events = Script().until_half().to_failure(ending).events
    out, _ = plain(events)
    assert "100%" not in out
    assert f"disk 2 {ending}" in out
    assert "100%" not in screen(events)
    written: list[str] = []
    with Machine(written.append, written.append) as machine:
        for event in events:
            machine(event)
    assert "100/100\n" not in written


def test_machine() -> None:
    messages: list[str] = []
    progress: list[str] = []
    with Machine(messages.append, progress.append) as machine:
        for event in Script().until_half().to_the_end().events:
            machine(event)
    assert progress == ["4/100\n", "25/100\n", "29/100\n", "50/100\n", "54/100\n", "75/100\n",
                        "79/100\n", "99/100\n", "100/100\n"]  # fmt: skip
    parsed = [json.loads(line) for line in messages]
    assert [(m["type"], m["message"]) for m in parsed] == [
        ("message", "Converting the guest"),
        ("warning", "careful\x1b]0;owned\x07"),
        ("message", "Copying the disks"),
    ]


def test_a_message_looks_as_virt_v2v_writes_it() -> None:
    line = message_line('a ‘b’ "c"\r\n', 1_700_000_000.25, "error")
    assert re.fullmatch(
        r'\{ "message": "a ‘b’ \\"c\\"\\r\\n", '
        r'"timestamp": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.250000000[+-]\d\d:\d\d", '
        r'"type": "error" \}',
        line,
    )


def test_jsonl(tmp_path: Path) -> None:
    events = Script().until_half().events
    with JsonLines(tmp_path / "e") as renderer:
        for event in events:
            renderer(event)
            # Written at once, not when it is closed.
            assert (tmp_path / "e").read_text().splitlines()[-1] == event.to_json()
    lines = (tmp_path / "e").read_text().splitlines()
    assert [Event.from_json(line) for line in lines] == events


def test_jsonl_to_a_descriptor_leaves_it_open() -> None:
    reader, writer = os.pipe()
    try:
        with JsonLines(writer) as renderer:
            renderer(Script().until_half().events[0])
        os.write(writer, b"end\n")
        assert os.read(reader, 65536).endswith(b"}\nend\n")
    finally:
        os.close(reader)
        os.close(writer)


def screen(events: list[Event], width: int = 80, height: int = 24) -> str:
    """Return everything printed, and after each event the live part, as text."""
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    terminal = Terminal(console, clock=lambda: events[-1].time, is_animated=False)
    shown = []
    for event in events:
        terminal(event)
        lines = console.render_lines(terminal.view(), pad=False)
        assert len(lines) < height
        assert all(Segment.get_line_length(line) <= width for line in lines)
        shown.append("\n".join("".join(part.text for part in line) for line in lines))
    return file.getvalue() + "\n".join(shown)


def test_terminal() -> None:
    text = screen(Script().until_half().events)
    assert re.search(r"^✓ convert +3\.0 s$", text, re.MULTILINE)
    assert "warning: convert: careful�]0;owned�" in text
    live = text.splitlines()[-4:]
    assert re.match(r"debian12�\[31m +copy  0:04", live[0])
    assert re.match(r"  disk 1 +━+.* 50% +50\.0 MiB of 100 MiB +12\.5 MiB/s +0:04", live[1])
    assert re.match(r"  disk 2 +━+.* 50% +250 MiB of 500 MiB +62\.5 MiB/s +0:04", live[2])
    assert re.match(r"whole run +━+.* 50% +300 MiB of 600 MiB +75\.0 MiB/s +0:04", live[3])
    assert "\x1b" not in text
    done = screen(Script().until_half().to_the_end().events)
    assert "✓ copy, disk 1" in done
    assert re.search(r"^✓ all +0:11$", done, re.MULTILINE)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 8), (40, 6), (10, 3), (200, 2)])
def test_many_disks_never_exceed_the_terminal(width: int, height: int) -> None:
    script = Script().until_half()
    for index in range(3, 60):
        state = Bytes(total=MIB * 2**20, data=MIB * 2**20, copied=MIB)
        script.copy.for_disk(index).emit("planned", bytes=state)
    text = screen(script.events, width, height)
    if (width, height) == (80, 8):
        assert re.search(r"… and \d+ more lines\nwhole|… and \d+ more lines$", text)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    with Terminal(Console(file=file, force_terminal=True), is_animated=False) as terminal:
        for event in Script().until_half().to_the_end().events:
            terminal(event)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][;m]", file.getvalue())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("\x1b[31mred", "�[31mred"),
        ("a\rb\tc\nd", "a b c d"),
        ("\x9b2J", "�2J"),
        ("evil\u202etxt", "evil�txt"),
        ("\udcff", "�"),
        ("naïve 日本", "naïve 日本"),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_schemas_are_current(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make-schemas", tmp_path], check=True)
    kept = ROOT / "docs" / "schema"
    for made in tmp_path.iterdir():
        assert (kept / made.name).read_text() == made.read_text(), "run scripts/make-schemas"
    assert {each.name for each in tmp_path.iterdir()} == {each.name for each in kept.glob("*.json")}


def test_the_picture_names_no_address(tmp_path: Path) -> None:
    recording, picture = tmp_path / "e.jsonl", tmp_path / "run.svg"
    events = Script().until_half().to_the_end().events
    recording.write_text("".join(event.to_json() + "\n" for event in events))
    script = ROOT / "scripts" / "make-screenshot"
    subprocess.run([sys.executable, script, recording, "7", picture], check=True)
    svg = picture.read_text()
    assert "disk&#160;2" in svg
    assert set(re.findall(r"[a-z]+://[^\s\"')]+", svg)) == {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in svg
