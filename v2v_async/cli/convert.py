"""``v2v-async convert``, which is ``virt-v2v-async``: one guest, the six steps."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence

from v2v_async.cli import modes, table, virt_v2v
from v2v_async.cli.failure import explain
from v2v_async.cli.run import report, run
from v2v_async.cli.screen import Sink, open_target
from v2v_async.cli.source_info import describe
from v2v_async.errors import V2VError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.render.machine import message_line


def convert(argv: Sequence[str], prog: str, *, usage: str | None = None) -> int:
    """Do what virt-v2v's command line ``argv`` says; return the exit status.

    ``prog`` names the program in messages, ``usage`` in its help.
    """
    words: virt_v2v.Words | None = None
    try:
        words = virt_v2v.read(argv)
        if (status := answer(words, prog, table.parser(usage or prog))) is not None:
            return status
        options, edge = virt_v2v.guest_options(words), virt_v2v.edge_options(words)
    except V2VError as error:
        return refuse(error, words, prog)

    async def job(reporter: Reporter) -> object:
        from v2v_async import guest  # late: it brings in libnbd and pydantic's schemas

        if edge.print_source:
            return await guest.describe_source(options.input, reporter)
        return await guest.convert_guest(options, reporter)

    def after(result: object) -> None:
        if isinstance(result, SourceGuest):
            print_source(result, edge)

    return run(job, edge, prog, warnings=warnings_of(words, options.input), after=after)


def print_source(source: SourceGuest, edge: virt_v2v.EdgeOptions) -> None:
    """Print what --print-source asks for."""
    is_for_program = edge.machine_readable is not None
    # In one line: whoever reads messages from there reads one JSON object a line.
    text = source.model_dump_json() + "\n" if is_for_program else describe(source)
    Sink(sys.stdout)(text)


def answer(words: virt_v2v.Words, prog: str, parser: ArgumentParser) -> int | None:
    """Answer --help, --version, -io ?, -oo ? and a lone --machine-readable."""
    if words.wants_help:
        parser.print_help()
        return 0
    if words.wants_version:
        Sink(sys.stdout)(version(prog))
        return 0
    if words.machine_readable is not None and not words.words:
        write, close = open_target("--machine-readable", words.machine_readable)
        write(modes.capabilities())
        close()
        return 0
    listed = virt_v2v.listed_options(words)
    if listed is not None:
        Sink(sys.stdout)(listed)
        return 0
    return None


def version(prog: str) -> str:
    """Return what --version prints."""
    from v2v_async import __version__

    return f"{prog} {__version__}\n"


def warnings_of(words: virt_v2v.Words, options: InputOptions) -> list[str]:
    """Return what a command line is warned of."""
    warnings = list(words.warnings)
    kind = modes.INPUT_KINDS[options.kind]
    warnings += [
        f"{option} is not used by {kind.name}"
        for option in ("-ic", "-ip")
        if words.has(option) and option not in kind.uses
    ]
    return warnings


def refuse(error: V2VError, words: virt_v2v.Words | None, prog: str) -> int:
    """Report a wrong command line, to the program that reads --machine-readable too.

    ``words`` is None where it could not be taken apart.
    """
    target = words.machine_readable if words else getattr(error, "machine_readable", None)
    failure = explain(error)
    if target is not None:
        try:
            write, close = open_target("--machine-readable", target)
        except V2VError:
            return report(failure, prog)
        write(message_line(failure.one_line(), time.time(), "error") + "\n")
        close()
    return report(failure, prog)
