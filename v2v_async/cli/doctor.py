"""``v2v-async doctor``: what is installed, what works, and what adds the rest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial

import anyio
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich_argparse import RichHelpFormatter

from v2v_async.doctor import Finding, Report, State, examine

_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "missing": ("missing", "red"),
    "old": ("too old", "red"),
    "warning": ("warning", "yellow"),
    "unknown": ("?", "dim"),
}
_LISTS = ("Python", "plugins", "filters")
"""Groups whose good members are named in one row: there is nothing to say about each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add doctor's options to its parser."""
    parser.add_argument("--json", action="store_true", help="print JSON (version 1)")
    parser.add_argument(
        "--appliance",
        action="store_true",
        help="also start libguestfs's appliance (seconds with KVM, up to minutes without)",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="say only what is missing or does not work"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run doctor and return its exit status: 1 when something needed is missing."""
    report = anyio.run(partial(examine, with_appliance=arguments.appliance))
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report, Console(), quiet=arguments.quiet)
    return 0 if report.is_ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``doctor`` by itself."""
    parser = argparse.ArgumentParser(
        prog="v2v-async doctor",
        description="Say what is installed, what works, and the command that adds what is missing.",
        formatter_class=RichHelpFormatter,
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def show(report: Report, console: Console, *, quiet: bool = False) -> None:
    """Print the report for a person."""
    if not quiet:
        console.print(_table(report.findings))
    elif troubles := [f for f in report.findings if f.is_fatal or f.state == "warning"]:
        console.print(_table(troubles))
    for needed, title in ((True, "To add what is needed:"), (False, "To add what is optional:")):
        commands = report.commands(needed=needed)
        if commands and (needed or not quiet):
            console.print(title)
            for command in commands:
                # Whole lines, so that they can be copied.
                console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
    if report.is_ok:
        if not quiet:
            console.print("Everything that v2v-async needs is here.", style="green")
    else:
        console.print("Something that v2v-async needs is missing.", style="red")


def _table(findings: Iterable[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "what", "state", "version"):
        table.add_column(title, no_wrap=title != "what")
    table.add_column("where or why", overflow="fold")
    group = ""
    for finding in _folded(list(findings)):
        mark, style = _MARKS[finding.state]
        if finding.state == "missing" and not finding.is_needed:
            mark, style = "optional", "yellow"
        table.add_row(
            Text(finding.group if finding.group != group else "", style="bold"),
            Text(finding.name),
            Text(mark, style=style),
            Text(finding.version),
            Text(finding.detail),
        )
        group = finding.group
    return table


def _folded(findings: list[Finding]) -> list[Finding]:
    """Put the good members of a list group into one row, where the first of them stood."""
    rows: list[Finding] = []
    done: set[str] = set()
    for finding in findings:
        if not _is_plain(finding):
            rows.append(finding)
        elif finding.group not in done:
            done.add(finding.group)
            plain = [f for f in findings if f.group == finding.group and _is_plain(f)]
            # Packages have a version each; all plugins and filters have nbdkit's.
            is_each = finding.group == "Python"
            names = [f"{f.name} {f.version}" if is_each else f.name for f in plain]
            version = "" if is_each else finding.version
            rows.append(Finding(finding.group, ", ".join(names), "ok", True, version))
    return rows


def _is_plain(finding: Finding) -> bool:
    return finding.state == "ok" and finding.group in _LISTS and not finding.detail.startswith("/")


if __name__ == "__main__":
    sys.exit(main())
