"""Copying while converting: the two longest steps of a guest at the same time.

::

    input ──> output ──> convert  in1 … ────────────> done, or failed: the copy is stopped
      │                     │ what it has changed so far is looked at, and left out
      │                     v
      └───────────────> copy  plain1 … ──> out1 … ──> and then what was changed, in1 … ──> out1 …

The content of the targets is that of a copy which begins when the guest is converted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import anyio

from v2v_async.copy.overlapped import OverlappedCopy
from v2v_async.errors import UsageError, most_telling
from v2v_async.events import Reporter
from v2v_async.input.kept import changed_so_far, classify_changes
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import GuestOptions, OverlapOptions
from v2v_async.output.contract import Output
from v2v_async.steps import run_convert, step
from v2v_async.units import GIB, format_size
from v2v_async.v2vdir import V2VDir

SMALLEST = GIB
"""Bytes that the disks hold from which on ``auto`` copies early: less is copied in seconds, and a
conversion takes minutes."""

# To look costs what the log of the overlay has grown to, or its extents: a second of every twenty
# at most.
_LOOK_EVERY_S = 2.0
_LOOK_SHARE = 20


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether disks are copied while they are converted, and why.

    ``is_asked``: a person said so, and need not be told.
    """

    is_on: bool
    reason: str
    is_asked: bool = False

    def tell(self, reporter: Reporter) -> None:
        """Say what was decided."""
        text = (
            f"the disks are copied while the guest is converted: {self.reason}"
            if self.is_on
            else f"the disks are copied when the guest is converted: {self.reason}"
        )
        (reporter.debug if self.is_asked else reporter.message)(text)


def decide(options: GuestOptions, source: SourceGuest, output: Output) -> Decision:
    """Return whether to copy early; after all checks, before anything is made.

    Raises:
        UsageError: ``--overlap=on``, and this guest can't be copied early.
    """
    mode = options.overlap.mode
    if mode == "off":
        return Decision(False, "--overlap=off", is_asked=True)
    problem = _problem(options, source, output)
    if problem is not None and mode == "on":
        raise UsageError(
            f"--overlap=on: the disks can't be copied before the guest is converted: {problem}",
            hint="leave --overlap out",
        )
    held = _held(source)
    if mode == "on":
        return Decision(True, "--overlap=on", is_asked=True)
    if held < SMALLEST:
        return Decision(False, f"they hold only {format_size(held)}")
    if problem is None:
        far = next((disk for disk in source.disks if not disk.files), None)
        if far is None:
            return Decision(True, f"they hold {format_size(held)}, and are local")
        problem = (
            f"‘{far.source}’ is not a local file, and the conversion reads it too; --overlap=on "
            "does both at once"
        )
    return Decision(False, problem)


def _problem(options: GuestOptions, source: SourceGuest, output: Output) -> str | None:
    """Return why it can't be done, whoever wishes it."""
    if options.copy.copier != "native":
        return f"{options.copy.copier} can't copy parts of a disk"
    if ("overlay", "cow") in options.input.options:
        return "-io overlay=cow does not tell what the conversion changes"
    if any(name == "compressed" for name, _ in options.output.options):
        return "a cluster can't be compressed twice"
    return output.why_not_early(source, options.output.name or source.name)


def _held(source: SourceGuest) -> int:
    """Return the bytes that the disks hold, as far as it is known."""
    return sum(
        min(disk.allocated, disk.size or disk.allocated)
        if disk.allocated is not None
        else disk.size
        for disk in source.disks
    )


async def convert_and_copy(
    v2vdir: V2VDir, source: SourceGuest, options: GuestOptions, reporter: Reporter
) -> TargetGuest:
    """Convert the guest and copy its disks, whose targets have been set up, at the same time.

    Either step's failure stops the other one.

    Raises:
        V2VError: a step failed; the targets are incomplete.
    """
    is_converted = anyio.Event()
    targets: list[TargetGuest] = []

    async def run_both() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(copy)
            targets.append(
                await run_convert(v2vdir, source, options.convert, options.output.name, reporter)
            )
            is_converted.set()

    async def copy() -> None:
        async with step("copy", v2vdir, reporter) as mine:
            copying = OverlappedCopy(v2vdir, source, options.copy, mine)
            watch = _Watch(v2vdir, copying, _limit(options.overlap, source), mine)
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(watch.run, is_converted)
                    await copying.copy_early()
                    if not is_converted.is_set():
                        mine.message(
                            "all that was not changed is copied; the rest follows when the guest "
                            "is converted"
                        )
            except BaseExceptionGroup as grouped:
                raise most_telling(grouped) from None
            changes = {
                index: await classify_changes(v2vdir, index, also=early.left_out)
                for index, early in copying.disks.items()
            }
            await copying.copy_rest(changes)

    try:
        await run_both()
    except BaseExceptionGroup as grouped:
        raise most_telling(grouped) from None
    return targets[0]


def _limit(options: OverlapOptions, source: SourceGuest) -> int:
    """Return how many bytes may be copied in vain before the early copy waits."""
    if options.waste is not None:
        return options.waste
    return int(_held(source) * options.waste_percent / 100)


class _Watch:
    """Looks at what the conversion changes, and keeps the early copy from copying it."""

    def __init__(
        self, v2vdir: V2VDir, copying: OverlappedCopy, limit: int, reporter: Reporter
    ) -> None:
        self._v2vdir = v2vdir
        self._copying = copying
        self._limit = limit
        self._reporter = reporter
        self._is_waiting = False

    async def run(self, is_converted: anyio.Event) -> None:
        """Look now and then, and once more when the guest is converted; then return."""
        pause_s = _LOOK_EVERY_S
        while not is_converted.is_set():
            with anyio.move_on_after(pause_s):
                await is_converted.wait()
            began = time.monotonic()
            await self._look()
            pause_s = max(_LOOK_EVERY_S, _LOOK_SHARE * (time.monotonic() - began))
        await self._look()
        for early in self._copying.disks.values():
            early.pause(False)

    async def _look(self) -> None:
        disks = self._copying.disks
        for index, early in disks.items():
            early.leave_out(await changed_so_far(self._v2vdir, index))
        wasted = sum(early.wasted() for early in disks.values())
        has_more = not all(early.is_complete for early in disks.values())
        if wasted > self._limit and has_more and not self._is_waiting:
            self._is_waiting = True
            self._reporter.message(
                f"{format_size(wasted)} have been copied in vain: the copy waits for the conversion"
            )
            for early in disks.values():
                early.pause(True)
