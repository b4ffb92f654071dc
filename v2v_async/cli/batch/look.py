"""``v2v-async batch status`` and ``report``: look at a run, from any terminal."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.text import Text

from v2v_async.batch.record import folder
from v2v_async.batch.record.journal import ENDED, open_journal
from v2v_async.cli.batch.past import is_ending, so_far
from v2v_async.cli.screen import Screen, Sink
from v2v_async.cli.virt_v2v import EdgeOptions
from v2v_async.errors import UsageError, V2VError
from v2v_async.render.batch_state import BatchState
from v2v_async.render.batch_view import BatchView

PROG = "v2v-async batch"
_POLL_EVERY_S = 0.2
_MOST_LINES = 100_000


def status(words: Namespace) -> int:
    """Show it; return the exit status.

    Raises:
        V2VError: there is no such run, or its journal can't be read.
    """
    home = folder.state_home()
    if words.run is None:
        if words.follow or words.json:
            raise UsageError("which run?", hint="v2v-async batch status lists them")
        return _list(home)
    path = folder.existing(home, words.run)
    if words.follow:
        return _follow(path, words)
    state = BatchState()
    events, _, is_alive = so_far(path)
    for event in events:
        state.apply(event)
    if words.json:
        snapshot = state.snapshot(time.time())
        Sink(sys.stdout)(json.dumps({**snapshot, "is_running": is_alive}, indent=1) + "\n")
        return 0
    _show(path, state, is_alive=is_alive)
    return 0


def report(words: Namespace) -> int:
    """Say what became of each guest; return the exit status.

    Raises:
        V2VError: there is no such run, or the file can't be written.
    """
    from v2v_async.cli.batch.report import write_report

    path = folder.existing(folder.state_home(), words.run)
    write_report(path, words.format, words.output)
    return 0


def _show(path: Path, state: BatchState, *, is_alive: bool) -> None:
    """Print all there is to see now."""
    console = Console(highlight=False)
    left = sum(guest.phase not in ENDED for guest in state.guests.values())
    console.print(Text(f"{path.name}: {_how(path, left, is_alive=is_alive)}", "bold"))
    # Of a run that has stopped nothing goes on from the moment that it was looked at.
    now = time.time() if is_alive or state.started is None else state.started
    for line in BatchView(state).lines(now, console.width, _MOST_LINES):
        console.print(Text.assemble(*line), no_wrap=True, crop=False)


def _how(path: Path, left: int, *, is_alive: bool) -> str:
    if is_alive:
        return "running"
    return f"stopped; to go on: {PROG} resume {path.name}" if left else "ended"


def _list(home: Path) -> int:
    """List the runs, the newest last."""
    write = Sink(sys.stdout)
    names = folder.runs(home)
    if not names:
        write(f"no runs yet in ‘{home}’; to begin one: v2v-async batch init plan.toml\n")
    for name in names:
        try:
            with open_journal(home / name / folder.JOURNAL, read_only=True) as journal:
                counts = Counter(each.phase for each in journal.guests())
        except (V2VError, OSError) as error:
            message = error.message if isinstance(error, V2VError) else f"{error.strerror}"
            write(f"{name}: can't be read: {message}\n")
            continue
        left = sum(count for phase, count in counts.items() if phase not in ENDED)
        told = ", ".join(f"{count} {phase}" for phase, count in counts.items())
        how = _how(home / name, left, is_alive=folder.is_alive(home / name))
        write(f"{name}: {told}: {how}\n")
    return 0


def _follow(path: Path, words: Namespace) -> int:
    """Show a run until it ends, its supervisor is gone, or the person has seen enough."""
    has_left: list[bool] = []
    edge = EdgeOptions(quiet=words.quiet, verbose=words.verbose)
    with Screen(edge, PROG, is_batch=True, on_leave=lambda: has_left.append(True)) as screen:
        before, reader, _ = so_far(path)
        screen.catch_up(before)
        try:
            while not has_left:
                is_alive = folder.is_alive(path)
                for event in reader.read():
                    screen.emit(event)
                    if is_ending(event):
                        return 0
                if not is_alive:
                    break
                time.sleep(_POLL_EVERY_S)
        except KeyboardInterrupt:
            return 0
    if has_left:
        return 0
    with open_journal(path / folder.JOURNAL, read_only=True) as journal:
        left = sum(each.phase not in ENDED for each in journal.guests())
    Sink(sys.stdout)(f"{PROG}: {path.name}: {_how(path, left, is_alive=False)}\n")
    return 0
