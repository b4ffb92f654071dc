"""``v2v-async bench``: measure copying on this machine, beside nbdcopy and qemu-img."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from v2v_async.bench import machine, plot, report, suite
from v2v_async.bench.report import Report
from v2v_async.bench.runner import Contender, Runner
from v2v_async.bench.suite import OURS, Scenario, Suite
from v2v_async.cli.help import HelpFormatter, completed_by
from v2v_async.errors import UsageError
from v2v_async.units import format_size

PROG = "v2v-async bench"
_PIPE_WIDTH = 160
"""Columns of the table where there is no terminal to ask: enough for four contestants."""


def parser() -> argparse.ArgumentParser:
    """Return bench's parser."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Measure copying on this machine: v2v-async, nbdcopy and qemu-img convert copy "
        "the same disks on the same servers, in turn. Or measure between two ends of your own: "
        "--source and --target.",
        formatter_class=HelpFormatter,
    )
    made.add_argument("scenario", nargs="*", metavar="SCENARIO", help="default: all; see --list")
    made.add_argument("--list", action="store_true", help="list the scenarios and stop")
    made.add_argument(
        "--rounds", type=_rounds, default=5, metavar="N", help="turns of each (default: 5)"
    )
    made.add_argument(
        "--size-scale",
        type=_scale,
        default=1.0,
        metavar="F",
        help="make all disks F times as large: 0.1 is a quick look",
    )
    made.add_argument(
        "--against",
        action="append",
        metavar="WHO",
        help="nbdcopy, qemu-img, or the path of another nbdcopy; may be repeated, the first is "
        "who the ratio is of (default: nbdcopy and qemu-img)",
    )
    made.add_argument(
        "--flush", action="store_true", help="let all flush the target (default: none)"
    )
    file = made.add_argument(
        "--suite", type=Path, metavar="FILE", help="a suite of your own (TOML)"
    )
    completed_by(file, "file")
    made.add_argument("--source", metavar="END", help="measure from this NBD URI or raw file …")
    made.add_argument("--target", metavar="END", help="… to this one, which is overwritten")
    made.add_argument(
        "--overwrite-target", action="store_true", help="yes, the target may be overwritten"
    )
    folder = made.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="make disks there (default: $TMPDIR or /var/tmp; /dev/shm is memory)",
    )
    completed_by(folder, "directory")
    for name, text in (("--json", "every measurement"), ("--svg", "a plot")):
        out = made.add_argument(name, type=Path, metavar="FILE", help=f"write {text} there")
        completed_by(out, "file")
    made.add_argument("--all", action="store_true", help="show CPU and memory of every scenario")
    made.add_argument(
        "--check", action="store_true", help="exit with 1 when a promise of the suite is not kept"
    )
    made.add_argument("-q", "--quiet", action="store_true", help="only the table")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show the table, write the files, and say by the status whether all went well.

    Raises:
        UsageError: the command line or the suite is wrong.
    """
    arguments = parser().parse_args(argv)
    chosen_suite, scenarios = _what(arguments)
    if arguments.list:
        _list(scenarios)
        return 0
    contenders = _contenders(arguments.against or ["nbdcopy", "qemu-img"])
    for path in (arguments.json, arguments.svg):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: its directory does not exist")
    made = Report(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        suite=chosen_suite.title,
        rounds=arguments.rounds,
        size_scale=arguments.size_scale,
        flush=arguments.flush,
        baseline=contenders[1].name,
        machine=machine.describe(),
        versions=machine.versions({c.name: c.program[0] for c in contenders if c.name != OURS}),
    )
    with _unwinding_on_signals(), _scratch(arguments.scratch) as scratch:
        made.scratch = str(scratch.parent)
        try:
            runner = Runner(
                chosen_suite,
                contenders,
                scratch,
                rounds=arguments.rounds,
                flush=arguments.flush,
                tell=_teller(quiet=arguments.quiet),
            )
            for number, scenario in enumerate(scenarios):
                later = scenarios[number + 1 :]
                made.scenarios.append(runner.run(scenario, later=later))
        finally:
            # Also after Ctrl-C: what was measured is not lost.
            if made.scenarios:
                _write(made, arguments)
    show(
        made, Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH), everything=arguments.all
    )
    broken = made.failures or (arguments.check and made.missed)
    return 1 if broken else 0


def show(made: Report, console: Console, *, everything: bool = False) -> None:
    """Print the report for a person."""
    names = made.names
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scenario", no_wrap=True)
    table.add_column("", style="dim")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"against {made.baseline}", justify="right")
    table.add_column("wanted")
    table.add_column("")
    verdict = {True: Text("kept", "green"), False: Text("missed", "red"), None: Text()}
    last = ""
    for row in report.rows(made, all_measures=everything):
        table.add_row(
            Text(row.scenario if row.scenario != last else ""),
            row.measure,
            *(row.cells.get(name, "") for name in names),
            row.figure,
            row.wanted,
            verdict[row.is_kept],
        )
        last = row.scenario
    console.print(table)
    for line in report.circumstances(made):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for line in made.failures:
        console.print(Text(f"failed: {line}", style="red"), soft_wrap=True)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"‘{text}’ is not a number from 1 on")
    return int(text)


def _scale(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1000:
        raise argparse.ArgumentTypeError(f"‘{text}’ is not a factor (write for example 0.1)")
    return factor


def _what(arguments: argparse.Namespace) -> tuple[Suite, list[Scenario]]:
    """Return the suite and its scenarios that are wanted, scaled."""
    made = suite.load(arguments.suite) if arguments.suite else suite.load()
    source, target = arguments.source, arguments.target
    if source is None and target is None:
        scenarios = made.chosen(arguments.scenario)
        return made, [scenario.scaled(arguments.size_scale) for scenario in scenarios]
    if source is None or target is None:
        raise UsageError("--source and --target go together")
    if arguments.scenario:
        raise UsageError("--source and --target are a scenario of their own: name no other")
    if not arguments.overwrite_target and target != "null:":
        raise UsageError(
            f"every run overwrites the target ‘{target}’",
            hint="add --overwrite-target when that is what you want",
        )
    yours = Scenario(name="yours", title=f"{source} to {target}", ends=((source, target),))
    if target == "null:":
        yours = yours.model_copy(update={"without": ("qemu-img",)})
    return made.model_copy(update={"title": "your own ends"}), [yours]


def _contenders(against: Sequence[str]) -> list[Contender]:
    """Return ours and the others, each with a name of its own."""
    found = [Contender(OURS, "ours", tuple(machine.ours()))]
    for word in against:
        if word == "nbdcopy":
            made = Contender("nbdcopy", "nbdcopy", ("nbdcopy",))
        elif word == "qemu-img":
            made = Contender("qemu-img", "qemu-img", ("qemu-img",))
        elif "/" not in word:
            raise UsageError(
                f"--against {word}: nobody of this name", hint="nbdcopy, qemu-img, or a path"
            )
        else:
            version = machine.version_of(word)
            if version is None:
                raise UsageError(f"--against {word}: it does not answer to --version")
            path = str(Path(word).absolute())
            made = Contender(f"nbdcopy-{version}", "nbdcopy", (path,))
        if made.name in [contender.name for contender in found]:
            raise UsageError(f"--against {word}: {made.name} takes part already")
        found.append(made)
    return found


def _list(scenarios: Sequence[Scenario]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("scenario", "what", "promise"):
        table.add_column(title, no_wrap=title == "scenario")
    for scenario in scenarios:
        table.add_row(*(Text(word) for word in (scenario.name, scenario.title, _wanted(scenario))))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def _wanted(scenario: Scenario) -> str:
    promise = scenario.promise
    words = [
        f"≥ {promise.speed:g} times as fast as nbdcopy" if promise.speed else "",
        f"aim {promise.aim:g}" if promise.aim else "",
        f"CPU ≤ {promise.cpu:g} times its" if promise.cpu else "",
        f"CPU ≤ {promise.cpu_seconds:g} s" if promise.cpu_seconds else "",
        f"memory ≤ {format_size(promise.memory)}" if promise.memory else "",
    ]
    return ", ".join(word for word in words if word)


def _write(made: Report, arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        report.write(made, arguments.json)
    if arguments.svg is not None:
        arguments.svg.write_text(plot.svg(made), encoding="utf-8")


def _teller(*, quiet: bool) -> Callable[[str], None]:
    console = Console(stderr=True, quiet=quiet)
    return lambda line: console.print(Text(line, style="dim"), soft_wrap=True)


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """Make a directory of our own, and remove it with all in it."""
    folder = parent or Path(os.environ.get("TMPDIR") or "/var/tmp")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory")
    path = Path(tempfile.mkdtemp(prefix="v2vb.", dir=folder.absolute()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind as Ctrl-C does, so that servers and files go."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)
