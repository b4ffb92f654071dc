"""Everything that can be known before the first slow step, looked at together.

All that is wrong is told in one go: who moves a guest at night should not find the second mistake
after mending the first.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from v2v_async import virt_v2v_in_place
from v2v_async.errors import UsageError, V2VError, leaves
from v2v_async.events import Reporter
from v2v_async.input.contract import Input
from v2v_async.model import SourceGuest
from v2v_async.output.contract import Output
from v2v_async.units import GIB, format_size
from v2v_async.v2vdir import default_parent

# virt-v2v(1) asks for as much in its temporary directory: what conversion writes to the overlays.
SCRATCH_SPACE = GIB


async def preflight(
    source_input: Input, output: Output, name: str | None, tmpdir: Path | None, reporter: Reporter
) -> SourceGuest:
    """Look at the source, the tools, the scratch space and the target; return the source.

    ``name`` is the target's (None: the source's); ``tmpdir`` is where the v2v directory will be.

    Raises:
        V2VError: what is wrong, if one thing is.
        ExceptionGroup: of V2VErrors, if several things are.
    """
    problems: list[Exception] = []
    source: SourceGuest | None = None
    async with _noting(problems, "input"):
        await source_input.check(reporter.for_step("input"))
        source = await source_input.describe()
    async with _noting(problems, "input"):
        check_scratch(tmpdir or default_parent())
    async with _noting(problems, "convert"):
        await virt_v2v_in_place.probe()
    async with _noting(problems, "output"):
        mine = reporter.for_step("output")
        await output.check(mine)
        if source is not None:
            await output.check_source(source, name or source.name, mine)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ExceptionGroup("what is wrong before the conversion", problems)
    assert source is not None
    return source


def check_scratch(directory: Path) -> None:
    """Check that what conversion writes to the overlays has room in ``directory``.

    Raises:
        UsageError: there is no such directory, or not enough room.
    """
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UsageError(
            f"the temporary directory ‘{directory}’ can't be used: {error.strerror}",
            hint="set TMPDIR to a directory that you can write in",
        ) from error
    if free < SCRATCH_SPACE:
        raise UsageError(
            f"‘{directory}’ has {format_size(free)} left; the conversion needs "
            f"{format_size(SCRATCH_SPACE)} there for what it changes",
            hint="free space there, or set TMPDIR to another directory",
        )


@asynccontextmanager
async def _noting(problems: list[Exception], step: str) -> AsyncIterator[None]:
    """Note what is raised on purpose instead of raising it."""
    try:
        yield
    except V2VError as error:
        error.locate(step=step)
        problems.append(error)
    except ExceptionGroup as group:
        found = list(leaves(group))
        for leaf in found:
            if not isinstance(leaf, V2VError):
                raise
            leaf.locate(step=step)
        problems += [leaf for leaf in found if isinstance(leaf, Exception)]
