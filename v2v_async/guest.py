"""One guest, all six steps, from top to bottom.

::

    check everything ──> 1 input ──> 2 convert ──> 3 output ──> 4 copy ──> 5 finalize ──> 6 clean up
                             └───────────┴─────────────┴──────────┴───────────┘
                      any failure or cancellation: servers stopped, half-made outputs removed,
                      the v2v directory removed but for its logs

Where it is worth it (``overlap.py``), 3 comes before 2, and 4 begins with 2.
"""

from __future__ import annotations

from pathlib import Path

from v2v_async.convert.networks import NetworkMap
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import GuestOptions, InputOptions
from v2v_async.output.registry import parse_output
from v2v_async.overlap import convert_and_copy, decide
from v2v_async.preflight import preflight
from v2v_async.server import running_servers
from v2v_async.steps import (
    look_at_source,
    run_convert,
    run_copy,
    run_finalize,
    run_input,
    run_output_setup,
    telling_guest,
    v2v_directory,
)


async def convert_guest(
    options: GuestOptions, reporter: Reporter, *, tmpdir: Path | None = None
) -> TargetGuest:
    """Convert one guest and return what was made of it.

    The v2v directory is made in ``tmpdir`` (default ``$TMPDIR``, else /var/tmp). The source is
    never written. When this raises or is cancelled, nothing of the target is left, nor any
    process; of the v2v directory only the logs.

    Raises:
        V2VError: with guest, step, disk and log, as far as they apply.
    """
    source_input = parse_input(options.input)
    output = parse_output(options.output)
    NetworkMap(options.convert.network)  # raises where two mappings contradict each other

    source = await preflight(source_input, output, options.output.name, tmpdir, reporter)
    overlap = decide(options, source, output)
    async with telling_guest(reporter, source.name, _summary(source)) as mine:
        overlap.tell(mine)
        async with (
            v2v_directory(tmpdir, mine, undo=output.abandon) as v2vdir,
            running_servers(v2vdir) as servers,
        ):
            v2vdir.update(is_overlapped=overlap.is_on)
            source = await run_input(v2vdir, source_input, servers, mine)
            name = options.output.name
            if overlap.is_on:
                await run_output_setup(v2vdir, output, source, name or source.name, servers, mine)
                target = await convert_and_copy(v2vdir, source, options, mine)
            else:
                target = await run_convert(v2vdir, source, options.convert, name, mine)
                await run_output_setup(v2vdir, output, source, target.name, servers, mine)
                await run_copy(v2vdir, source, options.copy, mine)
            await servers.stop_all()
            await run_finalize(v2vdir, output, target, mine)
    return target


async def describe_source(options: InputOptions, reporter: Reporter) -> SourceGuest:
    """Return what is known of the source before conversion (``--print-source``).

    Raises:
        SourceError: it can't be read.
    """
    return await look_at_source(parse_input(options), reporter)


def _summary(source: SourceGuest) -> dict[str, object]:
    return {
        "disks": [
            {"index": disk.index, "source": disk.source, "format": disk.format, "size": disk.size}
            for disk in source.disks
        ]
    }
