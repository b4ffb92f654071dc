"""``v2v-async in-place``: virt-v2v-in-place(1)'s command line, all or nothing."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace

from v2v_async.cli import table, virt_v2v
from v2v_async.cli.convert import answer, print_source, refuse, warnings_of
from v2v_async.cli.getopt import Option
from v2v_async.cli.run import run
from v2v_async.cli.screen import Sink
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import InPlaceOptions

PROG = "v2v-async in-place"

_OURS = (
    Option(("-O",), metavar="FILE", argument="required", once=True, files="file",
           help="write virt-v2v-inspector's document about the converted guest to FILE; "
           "‘-’ is standard output"),
    Option(("--direct",), help="write to the disks while converting, as virt-v2v-in-place does: "
           "what fails leaves them in an unknown state"),
)  # fmt: skip
SHOWN = (*table.INPUT, *table.CONVERSION, *table.NETWORK, *table.SCREEN, *table.GENERAL, *_OURS)
_REFUSED = (*table.OUTPUT, *table.COPY)


def parser() -> ArgumentParser:
    """Return the parser behind --help and completion: it never parses."""
    return table.parser(
        PROG,
        SHOWN,
        "Convert a guest on its own disks. They are written only when the conversion has ended "
        "well, and then wholly: a run that is killed meanwhile is completed by the next, or by "
        "v2v-async clean.",
        "Example: v2v-async in-place -i disk system.img. Every option of virt-v2v-in-place(1) is "
        "accepted, and virt-customize(1)'s operations.",
        usage=f"{PROG} [-i MODE] [-i…] [options] GUEST …",
    )


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` says; return the exit status."""
    words: virt_v2v.Words | None = None
    try:
        words = virt_v2v.read(argv, _OURS)
        if (status := answer(words, "v2v-async", parser())) is not None:
            return status
        options = in_place_options(words)
        edge = virt_v2v.edge_options(words)
    except V2VError as error:
        return refuse(error, words, "v2v-async")
    edge = replace(edge, keeps_stdout=edge.keeps_stdout or options.report == "-")

    async def job(reporter: Reporter) -> object:
        # Late: they bring in libnbd and pydantic's schemas.
        from v2v_async.guest import describe_source
        from v2v_async.in_place.run import convert_in_place

        if edge.print_source:
            return await describe_source(options.input, reporter)
        return await convert_in_place(options, reporter)

    def after(result: object) -> None:
        if isinstance(result, SourceGuest):
            print_source(result, edge)
        elif options.report == "-":
            Sink(sys.stdout)(str(result))

    return run(job, edge, "v2v-async", warnings=warnings_of(words, options.input), after=after)


def in_place_options(words: virt_v2v.Words) -> InPlaceOptions:
    """Return what an in-place conversion reads.

    Raises:
        UsageError: also for options of outputs and copies, which there are none of.
    """
    for option in _REFUSED:
        if words.has(option.name):
            raise UsageError(
                f"in-place takes no {option.name}: the guest stays where it is",
                hint="leave it out; v2v-async convert makes a new guest",
            )
    convert = virt_v2v.convert_options(words)
    virt_v2v.refuse_not_built(words)
    return InPlaceOptions(
        virt_v2v.input_options(words), convert, words.last("-O"), words.has("--direct")
    )
