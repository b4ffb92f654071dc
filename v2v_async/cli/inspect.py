"""``v2v-async inspect``: virt-v2v-inspector(1)'s command line."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from v2v_async.cli import table, virt_v2v
from v2v_async.cli.convert import answer, print_source, refuse, warnings_of
from v2v_async.cli.getopt import Option
from v2v_async.cli.run import run
from v2v_async.cli.screen import Sink
from v2v_async.errors import TargetError, UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.model import InspectedGuest, SourceGuest
from v2v_async.options import InspectOptions

if TYPE_CHECKING:
    from v2v_async.cli.virt_v2v import Words

PROG = "v2v-async inspect"

_OURS = (
    Option(("-O",), metavar="FILE", argument="required", once=True, files="file",
           help="write the document to FILE; ‘-’, the default, is standard output"),
    Option(("--json",), help="JSON (docs/schema/inspect.json) instead of XML"),
)  # fmt: skip
_CONVERSION = tuple(each for each in table.CONVERSION if each.name in ("--root", "--key"))
SHOWN = (*table.INPUT, *_CONVERSION, *table.SCREEN, *table.GENERAL, *_OURS)
_REFUSED = (
    *table.OUTPUT,
    *table.COPY,
    *table.NETWORK,
    *(each for each in table.CONVERSION if each not in _CONVERSION),
)


def parser() -> ArgumentParser:
    """Return the parser behind --help and completion: it never parses."""
    return table.parser(
        PROG,
        SHOWN,
        "Say what is inside a guest, and how large it is, without converting it. Its disks are "
        "only read.",
        "Example: v2v-async inspect -i disk system.img --json",
        usage=f"{PROG} [-i MODE] [-i…] [options] GUEST …",
    )


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` says; return the exit status."""
    words: Words | None = None
    try:
        words = virt_v2v.read(argv, _OURS)
        if (status := answer(words, "v2v-async", parser())) is not None:
            return status
        options = inspect_options(words)
        edge = virt_v2v.edge_options(words)
    except V2VError as error:
        return refuse(error, words, "v2v-async")
    file = words.last("-O") or "-"
    is_json = words.has("--json")
    edge = replace(edge, keeps_stdout=edge.keeps_stdout or file == "-")

    async def job(reporter: Reporter) -> object:
        # Late: they bring in libnbd and pydantic's schemas.
        from v2v_async.guest import describe_source
        from v2v_async.inspection import inspect_guest, to_xml

        if edge.print_source:
            return await describe_source(options.input, reporter)
        found = await inspect_guest(options, reporter)
        text = _json(found) if is_json else to_xml(found)
        if file != "-":
            _write(text, Path(file))
        return text

    def after(result: object) -> None:
        if isinstance(result, SourceGuest):
            print_source(result, edge)
        elif file == "-":
            Sink(sys.stdout)(str(result))

    return run(job, edge, "v2v-async", warnings=warnings_of(words, options.input), after=after)


def inspect_options(words: Words) -> InspectOptions:
    """Return what an inspection reads.

    Raises:
        UsageError: also for options of outputs, copies and conversions.
    """
    convert = virt_v2v.convert_options(words)
    given = [each.name for each in _REFUSED if words.has(each.name)]
    given += convert.customize[:1]
    if given:
        raise UsageError(
            f"inspect takes no {given[0].partition('=')[0]}: it only looks",
            hint="leave it out; v2v-async convert makes a new guest",
        )
    root = convert.root or "single"
    if root == "ask":
        raise UsageError(
            "--root ask: inspect asks nothing",
            hint="leave it out: where there are several systems the error names them",
        )
    return InspectOptions(virt_v2v.input_options(words), root, convert.keys)


def _json(found: InspectedGuest) -> str:
    return found.model_dump_json(indent=2) + "\n"


def _write(text: str, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        TargetError: it can't be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise TargetError(f"-O: ‘{path}’ can't be written: {error.strerror}") from error
