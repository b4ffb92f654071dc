"""A source that needs a password: -ip FILE, or the terminal, and it is shown nowhere."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
import time
from pathlib import Path

from tests.conftest import program

# Nothing listens there: the password has been asked for long before.
SOURCE = ["-ic", "vpx://user@127.0.0.1:1/Datacenter/esxi", "guest", "-o", "null"]
PASSWORD = "correct horse battery"


def read_until(terminal: int, wanted: str, within_s: float = 60) -> str:
    """Return what the terminal shows up to ``wanted``, or to the end of the program."""
    shown = ""
    end = time.monotonic() + within_s
    while wanted not in shown and time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # EIO: the last process that had it has gone
            break
        if not chunk:
            break
        shown += chunk.decode(errors="replace")
    return shown


def _take_terminal() -> None:
    """Make the terminal on stdin the new session's own, so that Ctrl-C is a signal there."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def at_a_terminal(argv: list[str], typed: str, log: Path) -> tuple[int, str]:
    """Run the program at a terminal of its own, type a line at its prompt; return all it showed."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*program("virt-v2v-async"), f"--events={log}", *argv],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        shown = read_until(ours, "Password for")
        os.write(ours, typed.encode())
        shown += read_until(ours, "\0never")
        return process.wait(30), shown
    finally:
        os.close(ours)


def test_the_terminal_is_asked_and_shows_nothing(short_tmp: Path) -> None:
    log = short_tmp / "events.jsonl"
    status, shown = at_a_terminal(SOURCE, f"{PASSWORD}\n", log)
    assert status == 1, shown
    assert "Password for user@127.0.0.1:1: " in shown
    assert PASSWORD not in shown
    assert "127.0.0.1" in shown
    assert PASSWORD not in log.read_text()


def test_no_password_typed(short_tmp: Path) -> None:
    status, shown = at_a_terminal(SOURCE, "\n", short_tmp / "events.jsonl")
    assert status == 2, shown
    assert "none was typed" in shown


def test_ctrl_c_at_the_prompt(short_tmp: Path) -> None:
    status, shown = at_a_terminal(SOURCE, "\x03", short_tmp / "events.jsonl")
    assert status == 130, shown
    assert "Traceback" not in shown


def test_without_a_terminal_it_says_what_to_add() -> None:
    done = subprocess.run(
        [*program("virt-v2v-async"), *SOURCE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "add -ip FILE" in done.stderr


def test_a_password_file_that_others_wrote_wrong(short_tmp: Path) -> None:
    path = short_tmp / "password"
    path.write_text(f"{PASSWORD}\nand more\n")
    done = subprocess.run(
        [*program("virt-v2v-async"), *SOURCE, "-ip", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "on its only line" in done.stderr
    assert PASSWORD not in done.stderr
