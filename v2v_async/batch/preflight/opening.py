"""Opening every source and reaching every target of a batch, as each would by itself.

::

    guest ── source: check, describe ──┐
    guest ── source: check, describe ──┼─> check_source: is its name free? ─> what it takes
    target (once, for guests that say the same of it): check ──┘
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import anyio
import anyio.abc

from v2v_async.batch.plan.model import GuestPlan, Limits
from v2v_async.batch.preflight.claims import Taken, taken_sources, taken_targets
from v2v_async.batch.preflight.problems import Problem, of_error, of_guests
from v2v_async.batch.preflight.reach import (
    Looks,
    Place,
    local_paths,
    place_of_source,
    place_of_target,
    touch,
)
from v2v_async.batch.preflight.target_files import TargetFiles, pool_directory, target_files
from v2v_async.errors import V2VError
from v2v_async.events import Event, Reporter
from v2v_async.input.registry import parse_input
from v2v_async.model import SourceGuest
from v2v_async.options import GuestOptions, InputOptions, OutputOptions
from v2v_async.output.contract import Output
from v2v_async.output.registry import parse_output


@dataclass(slots=True)
class Opened:
    """What was found, by guest; of one whose source or target failed, something is missing."""

    sources: dict[str, SourceGuest] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    files: dict[str, TargetFiles] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Target:
    """One place that guests go to. ``pool``: the directory of a pool of libvirt's."""

    options: OutputOptions
    output: Output
    place: Place
    guests: list[str] = field(default_factory=list)
    has_been_reached: anyio.Event = field(default_factory=anyio.Event)
    is_usable: bool = False
    pool: Path | None = None


class Opening:
    """Opens the guests of a plan; :meth:`run` does it, once.

    The names of guests in ``begun`` need not be free. Messages go to ``reporter`` as they come,
    warnings are kept for :class:`Opened`.
    """

    def __init__(
        self,
        guests: Sequence[GuestPlan],
        options: Mapping[str, GuestOptions],
        limits: Limits,
        *,
        begun: frozenset[str],
        tmpdir: Path,
        looks: Looks,
        reporter: Reporter,
    ) -> None:
        self._guests = guests
        self._options = options
        self._limits = limits
        self._begun = begun
        self._tmpdir = tmpdir
        self._looks = looks
        self._reporter = reporter
        self._found = Opened()
        self._targets: dict[Hashable, _Target] = {}

    async def run(self) -> Opened:
        """Look at all of them; what fails is in the result."""
        for guest in self._guests:
            self._add_target(guest)
        async with anyio.create_task_group() as group:
            for target in self._targets.values():
                group.start_soon(self._reach, target)
            for guest in self._guests:
                group.start_soon(self._open, guest)
        return self._found

    def _add_target(self, guest: GuestPlan) -> None:
        options = self._options[guest.name].output
        key = _identity(options)
        target = self._targets.get(key)
        if target is None:
            try:
                output = parse_output(options)
            except V2VError as error:
                self._found.problems += of_error(guest.name, error)
                return
            place = place_of_target(guest, options, self._limits)
            target = self._targets[key] = _Target(options, output, place)
        target.guests.append(guest.name)

    async def _reach(self, target: _Target) -> None:
        """Check a target that guests share."""
        heard: list[Problem] = []

        async def look() -> None:
            await touch([target.options.storage or "/"])
            await target.output.check(self._listening(heard, None, "output"))
            target.pool = await pool_directory(target.output, target.options)

        try:
            await self._looks.at(target.place, look)
            target.is_usable = True
        except (V2VError, ExceptionGroup) as error:
            self._found.problems += [_shared(each, target.guests) for each in of_error(None, error)]
        finally:
            self._found.warnings += [_shared(each, target.guests) for each in heard]
            target.has_been_reached.set()

    async def _open(self, guest: GuestPlan) -> None:
        source = await self._source(guest)
        options = self._options[guest.name].output
        target = self._targets.get(_identity(options))
        name = options.name or (source.name if source is not None else None)
        if name is None or target is None:
            return
        await target.has_been_reached.wait()
        self._found.names[guest.name] = name
        try:
            output = parse_output(options)
            files = None
            if source is not None and target.is_usable:
                files = await self._target(guest, output, target, name, source)
            self._found.taken += taken_targets(guest.name, output, options, name, files)
        except (V2VError, ExceptionGroup) as error:
            self._found.problems += of_error(guest.name, error)

    async def _source(self, guest: GuestPlan) -> SourceGuest | None:
        """Open a guest's source, and return what it is."""
        options = _as_served(self._options[guest.name].input)
        reporter = self._listening(self._found.warnings, guest.name, "input")

        async def look() -> SourceGuest:
            await touch(local_paths(options))
            source_input = parse_input(options)
            await source_input.check(reporter)
            return await source_input.describe()

        place = place_of_source(guest, options, self._limits)
        try:
            # A packed OVA is read to its end, however long that is.
            source = await self._looks.at(place, look, is_bounded=options.kind != "ova")
        except (V2VError, ExceptionGroup) as error:
            self._found.problems += of_error(guest.name, error)
            return None
        self._found.sources[guest.name] = source
        self._found.taken += taken_sources(guest.name, options, source)
        return source

    async def _target(
        self, guest: GuestPlan, output: Output, target: _Target, name: str, source: SourceGuest
    ) -> TargetFiles:
        """Look whether the guest can be made there; return where its disks go."""
        if guest.name not in self._begun:
            reporter = self._listening(self._found.warnings, guest.name, "output")
            check = partial(output.check_source, source, name, reporter)
            try:
                await self._looks.at(target.place, check)
            except (V2VError, ExceptionGroup) as error:
                self._found.problems += of_error(guest.name, error)
        files = target_files(
            output, target.options, name, source, tmpdir=self._tmpdir, pool=target.pool
        )
        self._found.files[guest.name] = files
        # Of one that has begun they are its own; where libvirt would have them they are refused.
        if guest.name not in self._begun and output.name != "libvirt":
            self._found.warnings += _replaced(guest.name, files.names)
        return files

    def _listening(self, warnings: list[Problem], guest: str | None, step: str) -> Reporter:
        """Return a reporter that keeps warnings, and hands on what else people read."""
        whole = self._reporter if guest is None else self._reporter.for_guest(guest)
        mine = whole.for_step(step)

        def hear(event: Event) -> None:
            if event.type == "warning" and event.text is not None:
                warnings.append(Problem(guest, event.text, event.hint))
            elif event.type in ("message", "debug"):
                mine.emit("message" if event.type == "message" else "debug", event.text)

        return Reporter(hear, self._reporter.run, guest=guest, step=step)


def _replaced(guest: str, files: Sequence[Path]) -> list[Problem]:
    """Return the warning that files of an earlier guest will go, in one line for all of them."""
    there = [path for path in files if os.path.lexists(path) and not path.is_dir()]
    if not there:
        return []
    more = f" and {len(there) - 1} more" if len(there) > 1 else ""
    return [Problem(guest, f"‘{there[0]}’{more} will be replaced: it is there already")]


def _shared(problem: Problem, guests: Sequence[str]) -> Problem:
    return of_guests(guests, problem.message, problem.hint, is_permanent=problem.is_permanent)


def _identity(options: OutputOptions) -> Hashable:
    """Return what is the same for guests that say the same of their target, but for its name."""
    password = None if options.password is None else options.password.reveal()
    return replace(options, name=None, password=None), password


def _as_served(options: InputOptions) -> InputOptions:
    """Return the options with which a batch serves a source: its overlays are files."""
    others = tuple(pair for pair in options.options if pair[0] != "overlay")
    return replace(options, options=(*others, ("overlay", "qcow2")))
