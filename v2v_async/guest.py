"""One guest, all six steps, from top to bottom.

::

    check everything ──> 1 input ──> 2 convert ──> 3 output ──> 4 copy ──> 5 finalize ──> 6 clean up
                             └───────────┴─────────────┴──────────┴───────────┘
                      any failure or cancellation: servers stopped, half-made outputs removed,
                      the v2v directory removed but for its logs
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio

from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import V2VError
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import GuestOptions
from v2v_async.output.contract import Output
from v2v_async.output.registry import parse_output
from v2v_async.preflight import preflight
from v2v_async.server import running_servers
from v2v_async.steps import (
    run_convert,
    run_copy,
    run_finalize,
    run_input,
    run_output_setup,
    step,
    stop_recorded,
)
from v2v_async.v2vdir import V2VDir

# Removing half-made outputs is local and quick; a file system that hangs must not hold us for ever.
_ABANDON_TIMEOUT_S = 60.0


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
    mine = reporter.for_guest(source.name)
    began = time.monotonic()
    mine.emit("started", details=_summary(source))
    try:
        async with (
            _v2v_directory(tmpdir, output, mine) as v2vdir,
            running_servers(v2vdir) as servers,
        ):
            source = await run_input(v2vdir, source_input, servers, mine)
            target = await run_convert(v2vdir, source, options.convert, options.output.name, mine)
            await run_output_setup(v2vdir, output, source, target.name, servers, mine)
            await run_copy(v2vdir, source, options.copy, mine)
            await servers.stop_all()
            await run_finalize(v2vdir, output, target, mine)
    except V2VError as error:
        error.locate(guest=source.name)
        mine.emit(
            "failed",
            error.message,
            hint=error.hint,
            offset=error.offset,
            log=str(error.log) if error.log else None,
            duration_s=time.monotonic() - began,
        )
        raise
    except anyio.get_cancelled_exc_class():
        mine.emit("cancelled", duration_s=time.monotonic() - began)
        raise
    mine.emit("finished", duration_s=time.monotonic() - began)
    return target


async def describe_source(options: GuestOptions, reporter: Reporter) -> SourceGuest:
    """Return what is known of the source before conversion (``--print-source``).

    Raises:
        SourceError: it can't be read.
    """
    source_input = parse_input(options.input)
    with _located("input"):
        await source_input.check(reporter.for_step("input"))
        return await source_input.describe()


@contextmanager
def _located(step_name: str) -> Iterator[None]:
    """Tell errors of an early check which step they are of."""
    try:
        yield
    except V2VError as error:
        error.locate(step=step_name)
        raise


@asynccontextmanager
async def _v2v_directory(
    tmpdir: Path | None, output: Output, reporter: Reporter
) -> AsyncIterator[V2VDir]:
    """Have a v2v directory; after a failure, undo the output and keep the logs."""
    v2vdir = V2VDir.create(tmpdir)
    v2vdir.update(run=reporter.run)
    try:
        yield v2vdir
    except BaseException as error:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_ABANDON_TIMEOUT_S):
            await stop_recorded(v2vdir)
            await output.abandon(v2vdir, reporter)
        if isinstance(error, Exception) and any(v2vdir.log_directory.iterdir()):
            if isinstance(error, V2VError):
                phase = v2vdir.state.phase
                error.locate(step=None if phase == "new" else phase, log=v2vdir.log_directory)
            v2vdir.keep_only_logs()
        else:
            v2vdir.remove()
        raise
    async with step("cleanup", v2vdir, reporter):
        v2vdir.remove()


def _summary(source: SourceGuest) -> dict[str, object]:
    return {
        "disks": [
            {"index": disk.index, "source": disk.source, "format": disk.format, "size": disk.size}
            for disk in source.disks
        ]
    }
