"""The command line of ``v2v-async batch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from v2v_async.cli.help import HelpFormatter, completed_by

PROG = "v2v-async batch"

EXIT_STATUS = """\
Exit status: 0 all guests are done (or were cancelled by you); 1 the batch itself failed; 2 the
plan or the command line is wrong, nothing has begun; 10 + N when N guests failed (at most 109);
128 + N after signal N: everything is kept, and resume goes on with it.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all its commands."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Convert many guests in parallel, by a plan: TOML or YAML. What is done is "
        "noted as it happens; after a crash or a reboot, resume goes on from there.",
        epilog=EXIT_STATUS,
        formatter_class=HelpFormatter,
    )
    commands = made.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _init(commands)
    _run(commands)
    _status(commands)
    for name, text in (
        ("pause", "let nothing more begin; what runs goes on to the end of its step"),
        ("cancel", "stop guests for good, and remove what has been made of them"),
    ):
        sub = _command(commands, name, text)
        _run_and_guests(sub)
    _resume(commands)
    _report(commands)
    return made


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=HelpFormatter
    )


def _init(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = _command(commands, "init", "write a plan with comments, to be filled in")
    file = sub.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="plan.toml, or plan.yaml for YAML (default: to stdout)",
    )
    completed_by(file, "file")
    sub.add_argument("--yaml", action="store_true", help="YAML; a FILE must be named so")


def _run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = _command(commands, "run", "convert the guests of a plan")
    plan = sub.add_argument("plan", type=Path, metavar="PLAN", help="a TOML or YAML file")
    completed_by(plan, "file")
    sub.add_argument(
        "--name",
        metavar="RUN",
        help="what other commands call it (default: the plan's name and the time)",
    )
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="look at everything, show what is wrong and the schedule, and stop",
    )
    sub.add_argument(
        "--skip-wrong",
        action="store_true",
        help="convert the other guests where something is wrong with some",
    )
    _supervision(sub)


def _resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = _command(
        commands,
        "resume",
        "go on: with guests that were paused, or with a run that was stopped or killed",
    )
    _run_and_guests(
        sub,
        "take only these out of a pause (default: all); of a stopped run, all others that are not "
        "paused go on too, and those named here that failed or were cancelled are tried again",
    )
    sub.add_argument(
        "--failed", action="store_true", help="of a stopped run: try all that failed again"
    )
    _supervision(sub)


def _supervision(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--serve",
        metavar="HOST:PORT",
        help="show the run on a web page too, with /metrics for Prometheus: 127.0.0.1:8080",
    )
    sub.add_argument(
        "--no-token", action="store_true", help="let everybody who reaches the page see it"
    )
    sub.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="let dask workers do the work: tcp://HOST:8786, or local:N to start N here",
    )
    _screen(sub)
    events = sub.add_argument(
        "--events", metavar="FILE|fd:N", help="write all events as JSON Lines"
    )
    completed_by(events, "file")


def _status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = _command(commands, "status", "show how far a run is; without RUN, list the runs")
    sub.add_argument("run", nargs="?", metavar="RUN")
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--follow", action="store_true", help="go on showing it until it ends")
    how.add_argument("--json", action="store_true", help="as JSON (docs/schema/batch-state.json)")
    _screen(sub)


def _report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sub = _command(commands, "report", "say what became of each guest of a run")
    sub.add_argument("run", metavar="RUN")
    sub.add_argument(
        "--format", choices=["rich", "json", "csv", "html"], default="rich", help="default: rich"
    )
    out = sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="write it there")
    completed_by(out, "file")


def _run_and_guests(sub: argparse.ArgumentParser, text: str = "only these (default: all)") -> None:
    sub.add_argument("run", metavar="RUN", help="its name; v2v-async batch status lists them")
    # With a default, or argparse would say that it is required.
    sub.add_argument("guests", nargs="*", default=[], metavar="GUEST", help=text)


def _screen(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-q", "--quiet", action="store_true", help="show only warnings and errors")
    sub.add_argument("-v", "--verbose", action="store_true", help="show more")
