"""Keys on a real pseudo-terminal, and that the terminal is as it was whatever happens."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from v2v_async.render.keys import Keys, parse
from v2v_async.render.terminal_mode import TerminalMode

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "TERM": "xterm-256color"}


@pytest.mark.parametrize(
    ("received", "names"),
    [
        (b"jkgGfq? ", ["j", "k", "g", "G", "f", "q", "?", " "]),
        (b"\x1b[A\x1b[B\x1bOA\x1bOB", ["up", "down", "up", "down"]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[F", ["pgup", "pgdn", "home", "end"]),
        (b"\x1b[1~\x1b[4~\x1b[7~\x1b[8~", ["home", "end", "home", "end"]),
        (b"\x1b[1;5Aj", ["j"]),  # Ctrl and an arrow: nothing of ours
        (b"\x1b[200~j", ["j"]),
        (b"\x1bxj", ["x", "j"]),
        ("é日j".encode(), ["j"]),
        (b"\x00\x01\x7fj\r", ["j"]),
        (b"\x1b", ["escape"]),
    ],
)  # fmt: skip
def test_parse(received: bytes, names: list[str]) -> None:
    assert parse(received) == (names, b"")
    # However it was cut in two on the way, it is the same.
    for cut in range(len(received)):
        first, begun = parse(received[:cut], is_all=False)
        second, rest = parse(begun + received[cut:])
        assert (first + second, rest) == (names, b"")


def test_keys_come_from_a_terminal_one_by_one() -> None:
    master, slave = os.openpty()
    received: list[str] = []
    read, write = os.pipe()

    def take(key: str) -> None:
        received.append(key)
        os.write(write, b".")

    now = termios.tcgetattr(slave)
    now[3] &= ~termios.ICANON
    termios.tcsetattr(slave, termios.TCSANOW, now)
    try:
        with Keys(slave, take):
            for sent in (b"j", b"\x1b[", b"6~", b"\x1b"):
                os.write(master, sent)
                if sent != b"\x1b[":
                    assert select.select([read], [], [], 10)[0], received
                    os.read(read, 1)
        assert received == ["j", "pgdn", "escape"]
    finally:
        for descriptor in (master, slave, read, write):
            os.close(descriptor)


def test_a_terminal_that_goes_away_ends_the_reading() -> None:
    master, slave = os.openpty()
    keys = Keys(slave, lambda key: None)
    with keys:
        os.close(master)
        keys._thread.join(10)
        assert not keys._thread.is_alive()
    os.close(slave)


# A program on a terminal of its own. Its parent there does what a shell does, but leaves the
# terminal as it finds it, so that what is restored was restored by the program.

PROGRAM = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from rich.console import Console
from tests.batch_events import PretendedBatch
from v2v_async.render.batch_terminal import BatchTerminal, keyboard_of_stdin
left = threading.Event()
with BatchTerminal(Console(), keyboard=keyboard_of_stdin(), on_leave=left.set) as screen:
    batch = PretendedBatch(screen, guests=30, began=time.time())
    batch.begin()
    for _ in range(10):
        batch.go_on_to(batch.now + 10)
    {ending}
print("gone")
"""
SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    # What runs the tests may ignore some: what nohup or a script starts in the background does.
    for number in (signal.SIGTTOU, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
while True:
    _, status = os.waitpid(child, os.WUNTRACED | os.WCONTINUED)
    if os.WIFSTOPPED(status):
        os.tcsetpgrp(0, os.getpgrp())
        print("STOPPED", flush=True)
        if sys.stdin.readline() == "bg\\n":
            os.kill(child, signal.SIGCONT)
            sys.stdin.readline()
        os.tcsetpgrp(0, child)
        os.kill(child, signal.SIGCONT)
    elif not os.WIFCONTINUED(status):
        os.tcsetpgrp(0, os.getpgrp())
        print("ENDED", os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, child, flush=True)
        sys.stdin.readline()
        break
"""


class Running:
    """The program on its terminal."""

    def __init__(self, master: int, slave: int) -> None:
        self.master = master
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.output = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str) -> str:
        """Return what was written until ``pattern`` was; it is not looked at again."""
        end = time.monotonic() + 30
        while not (found := re.search(pattern, self.output)):
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern} in {self.output[-2000:]!r}"
            self.output += os.read(self.master, 65536).decode(errors="replace")
        seen, self.output = self.output[: found.end()], self.output[found.end() :]
        return seen

    def stop(self) -> str:
        """Press Ctrl-Z; return what was written until the shell has the terminal."""
        self.send("\x1a")
        return self.until("STOPPED")

    def until_drawn_again(self) -> str:
        """Return what was written until the cursor is hidden and the view is there."""
        return self.until(r"\x1b\[\?25l[^Z]*waiting: ")

    def leave(self) -> None:
        """Press q; the terminal is as it was then."""
        self.send("q")
        self.until("ENDED -1")
        assert self.is_as_before

    @property
    def is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    @property
    def gives_keys_at_once(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)


@contextmanager
def running(ending: str) -> Iterator[Running]:
    """Run the program; ``ending``: what it does after it has drawn."""
    program = PROGRAM.format(root=str(ROOT), ending=ending)
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    shell = subprocess.Popen(
        [sys.executable, "-c", SHELL, program],
        stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        yield Running(master, slave)
    finally:
        for descriptor in (master, slave):
            os.close(descriptor)
        # The terminal has gone: so do those on it.
        try:
            shell.wait(10)
        finally:
            shell.kill()
            shell.wait()


WAITS = "left.wait(60)"


def test_keys_move_the_view_and_q_leaves_it() -> None:
    with running(WAITS) as program:
        assert "\x1b[?25l" in program.until(r"… and \d+ more")
        assert program.gives_keys_at_once
        program.send("\x1b[6~")
        program.until(r"\d+ above")
        program.send("f")
        program.until("f everything")
        program.send("?")
        program.until("PgDn PgUp")
        program.send("q")
        assert "\x1b[?25h" in program.until("gone")
        program.until(r"ENDED -1")
        assert program.is_as_before


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("raise RuntimeError('a crash')", "-1"),
        ("sys.exit(3)", "-1"),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", "15"),
        ("os.kill(os.getpid(), signal.SIGHUP); signal.pause()", "1"),
        ("os.kill(os.getpid(), signal.SIGQUIT); signal.pause()", "3"),
        ("screen._stack.pop_all(); sys.exit(1)", "-1"),  # it is never left
    ],
    ids=["crash", "exit", "SIGTERM", "SIGHUP", "SIGQUIT", "atexit"],
)
def test_the_terminal_is_as_it_was(ending: str, status: str) -> None:
    with running(f"{WAITS}; {ending}") as program:
        program.until("waiting: ")
        assert program.gives_keys_at_once
        program.send("q")
        assert "\x1b[?25h" in program.until(f"ENDED {status} ")
        assert program.is_as_before


def test_ctrl_c_is_still_a_signal() -> None:
    with running(WAITS) as program:
        program.until("waiting: ")
        program.send("\x03")
        program.until("KeyboardInterrupt")
        program.until("ENDED")
        assert program.is_as_before


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again() -> None:
    with running(WAITS) as program:
        program.until("waiting: ")
        for _ in range(2):
            assert "\x1b[?25h" in program.stop()
            assert program.is_as_before
            program.send("fg\n")
            program.until_drawn_again()
            assert program.gives_keys_at_once
        program.send("f")
        program.until("f everything")
        program.leave()


def test_in_the_background_it_neither_draws_nor_reads() -> None:
    with running(WAITS) as program:
        program.until("waiting: ")
        program.stop()
        program.send("bg\n")
        # Time for two refreshes, which do not come; and the keys are the shell's.
        program.until("bg")
        time.sleep(0.6)
        program.send("q\n")
        seen = program.until("q")
        assert "waiting" not in seen
        assert "\x1b[" not in seen
        program.until_drawn_again()
        program.leave()


def test_without_a_keyboard_it_draws_all_the_same() -> None:
    # Longer than from one drawing to the next: what had come is drawn, and nobody could press q.
    program = PROGRAM.format(root=str(ROOT), ending="time.sleep(0.3)")
    master, slave = os.openpty()
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, env=ENVIRONMENT) as ran:
        received = b""
        while not received.endswith(b"gone\r\n") and select.select([master], [], [], 30)[0]:
            received += os.read(master, 65536)
        assert ran.wait(30) == 0
    for descriptor in (master, slave):
        os.close(descriptor)
    assert "… and" in received.decode()
    assert b"\x1b[?25h" in received


def test_a_thread_that_draws_while_the_terminal_is_given_back_does_not_take_it() -> None:
    master, slave = os.openpty()
    try:
        before = termios.tcgetattr(slave)
        mode = TerminalMode(slave, slave)
        with mode:
            assert termios.tcgetattr(slave) != before
            mode._restore()  # as a signal's handler does just before the end
            assert not mode.check()
            assert termios.tcgetattr(slave) == before
            mode._continue(signal.SIGCONT, None)
            assert mode.check()
            assert termios.tcgetattr(slave) != before
        assert not mode.check()
        assert termios.tcgetattr(slave) == before
    finally:
        os.close(master)
        os.close(slave)
