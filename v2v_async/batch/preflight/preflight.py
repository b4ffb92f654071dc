"""Everything that can be known of a batch before its first byte, told together.

::

    plan ────> limits, windows, names                                    satisfiable.py
    machine ─> programs; memory, open files, processes                   tools.py, machine.py
    sources ─> every one opens, described ─┐                             reach.py
    targets ─> every one reached ──────────┴> names free ─> claims       claims.py
                                             room, all of them together  room.py

Nothing is changed but the limit of open files, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.preflight import machine, room, satisfiable, tools
from v2v_async.batch.preflight.claims import collisions
from v2v_async.batch.preflight.opening import Opened, Opening
from v2v_async.batch.preflight.problems import Problem, merged, of_error
from v2v_async.batch.preflight.reach import DEADLINE_S, Looks
from v2v_async.batch.record.folder import Claim
from v2v_async.batch.schedule.needs import Facts, needs_of
from v2v_async.convert.networks import NetworkMap
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.options import ConvertOptions, GuestOptions
from v2v_async.preflight import check_scratch

_UNKNOWN = Facts((0,))
"""Of a source that could not be opened: it still has its needs of the limits."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found. Without problems, every guest that was looked at has facts.

    ``claims`` has the sources and targets; ``names`` is by guest what it will be called;
    ``capacities`` is what was given.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    capacities: Mapping[str, int] = field(default_factory=dict)


def check_conversion(convert: ConvertOptions) -> None:
    """Refuse what can't be in a batch, and files of keys that can't be read.

    Raises:
        UsageError
    """
    if convert.keys_from_stdin:
        raise UsageError(
            "--keys-from-stdin: a batch has nobody to type passphrases",
            hint="write each into a file: --key ID:file:FILE",
        )
    if convert.root == "ask":
        raise UsageError(
            "--root ask: a batch has nobody to answer", hint="write first, single or a device"
        )
    for key in convert.keys:
        _, _, rest = key.partition(":")
        kind, _, file = rest.partition(":")
        if kind == "file":
            try:
                with open(file, "rb"):
                    pass
            except OSError as error:
                raise UsageError(
                    f"--key: the file ‘{file}’ can't be read: {error.strerror}",
                    hint="write the passphrase into it",
                ) from error
    NetworkMap(convert.network)


async def preflight_batch(
    plan: Plan,
    options: Mapping[str, GuestOptions],
    *,
    tmpdir: Path,
    capacities: Mapping[str, int],
    reporter: Reporter,
    begun: frozenset[str] = frozenset(),
    deadline_s: float = DEADLINE_S,
) -> Checked:
    """Look at the guests of a plan that ``options`` has too; return all that is wrong, and warn.

    Only those are looked at: others of the plan are done, or what they are is not known. Those in
    ``begun`` have half-made things: their names are not free, and what they need is taken already.
    ``tmpdir`` is where v2v directories are made, ``deadline_s`` is for each look.
    """
    guests = [guest for guest in plan.guests if guest.name in options]
    options = {guest.name: options[guest.name] for guest in guests}
    missing = await tools.missing(options)
    opened = Opened()
    if missing.can_look and guests:
        opening = Opening(
            guests,
            options,
            plan.limits,
            begun=begun,
            tmpdir=tmpdir,
            looks=Looks(deadline_s),
            reporter=reporter,
        )
        opened = await opening.run()
    waiting = [guest for guest in guests if guest.name not in begun]
    # As the plan has them: they came in the order in which they answered.
    sources = {
        guest.name: opened.sources[guest.name] for guest in guests if guest.name in opened.sources
    }
    facts = {
        name: Facts(tuple(room.bytes_of(disk) for disk in source.disks))
        for name, source in sources.items()
    }
    read = {
        name: [file for disk in source.disks for file in disk.files]
        for name, source in sources.items()
    }
    parts = [
        _of_conversions(options),
        _of_plan(plan, guests, facts, capacities, is_whole=not begun),
        _of_machine(plan, guests, facts, capacities, reporter),
        _of_room(waiting, opened, tmpdir, capacities["scratch"]),
        (collisions(opened.taken, read), []),
    ]
    problems = [*missing.problems, *opened.problems]
    warnings = list(opened.warnings)
    for wrong, doubtful in parts:
        problems += wrong
        warnings += doubtful
    checked = Checked(
        in_order(problems, plan),
        in_order(warnings, plan),
        facts,
        [each.claim for each in opened.taken],
        opened.names,
        capacities,
    )
    for warning in checked.warnings:
        mine = reporter if warning.guest is None else reporter.for_guest(warning.guest)
        mine.warning(warning.message if warning.guest is not None else str(warning))
    return checked


def in_order(problems: Iterable[Problem], plan: Plan) -> list[Problem]:
    """Return each problem once: those of the batch, then by the place of their guests in it."""
    places = {guest.name: place for place, guest in enumerate(plan.guests)}
    known = [
        replace(each, guests=tuple(sorted(each.guests, key=places.__getitem__)))
        for each in merged(problems)
    ]
    return sorted(known, key=lambda each: places[each.guests[0]] if each.guests else -1)


_Found = tuple[list[Problem], list[Problem]]
"""What is wrong, and what people should know."""


def _of_conversions(options: Mapping[str, GuestOptions]) -> _Found:
    problems: list[Problem] = []
    for name, each in options.items():
        try:
            check_conversion(each.convert)
        except V2VError as error:
            problems += of_error(name, error)
    return problems, []


def _of_plan(
    plan: Plan,
    guests: Sequence[GuestPlan],
    facts: Mapping[str, Facts],
    capacities: Mapping[str, int],
    *,
    is_whole: bool,
) -> _Found:
    known = {guest.name: facts.get(guest.name, _UNKNOWN) for guest in guests}
    needs = needs_of(guests, known, capacities)
    problems = satisfiable.too_large(needs, capacities)
    problems += satisfiable.never_open(plan, needs, capacities)
    # Later, those that a name is for may be done.
    unused = satisfiable.unused(plan) if is_whole else []
    return problems, [Problem(None, text) for text in unused]


def _of_machine(
    plan: Plan,
    guests: Sequence[GuestPlan],
    facts: Mapping[str, Facts],
    capacities: Mapping[str, int],
    reporter: Reporter,
) -> _Found:
    disks = {name: len(fact.disks) for name, fact in facts.items()}
    crowd = machine.crowd(guests, disks, capacities, plan.windows)
    memory, tight = machine.check_memory(guests, plan.limits, plan.windows, capacities)
    files, done = machine.check_files(crowd.files)
    if done is not None:
        reporter.message(done)
    problems = [each for each in (memory, files, machine.check_tasks(crowd.tasks)) if each]
    return problems, [Problem(None, tight)] if tight is not None else []


def _of_room(waiting: Sequence[GuestPlan], opened: Opened, tmpdir: Path, scratch: int) -> _Found:
    try:
        if waiting:
            check_scratch(tmpdir)
    except V2VError as error:
        return list(of_error(None, error)), []
    names = {guest.name for guest in waiting}
    files = {name: each for name, each in opened.files.items() if name in names}
    demands = room.scratch_demand(waiting, scratch, tmpdir)
    demands += room.target_demands(waiting, files, scratch)
    return room.check_room(demands)
