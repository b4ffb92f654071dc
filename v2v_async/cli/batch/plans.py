"""What a plan says of a guest, read by virt-v2v's own command line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from v2v_async.batch.plan.file import read_plan
from v2v_async.batch.plan.model import (
    ConvertPlan,
    CopyPlan,
    GuestPlan,
    InputPlan,
    NetworkPlan,
    OutputPlan,
    Plan,
)
from v2v_async.cli import virt_v2v
from v2v_async.errors import UsageError, V2VError
from v2v_async.options import GuestOptions

_NOT_FOR_MANY = (
    ("--print-source", "v2v-async convert shows one guest"),
    ("--machine-readable", "--events of the batch tells programs"),
    ("--events", "give it to the batch"),
    ("--checkpoint", "a batch keeps its own"),
    ("--copier", "a batch copies all disks by one engine"),
    ("--bandwidth-file", "write [limits] bandwidth, or [[windows]]"),
)
_EMPTY = {
    "input": InputPlan(),
    "output": OutputPlan(),
    "network": NetworkPlan(),
    "convert": ConvertPlan(),
    "copy_": CopyPlan(),
}
"""The parts of a guest, by field, that say nothing."""
_STEPS: tuple[tuple[str, tuple[str, ...], Callable[[virt_v2v.Words], Any]], ...] = (
    ("input", ("input",), virt_v2v.input_options),
    ("convert", ("network", "convert"), virt_v2v.convert_options),
    ("output", ("output",), virt_v2v.output_options),
    ("copy", ("copy_",), virt_v2v.copy_options),
)
"""Each step's options, the parts of a plan that it reads, and how; it reads no others."""


def read(path: Path) -> tuple[Plan, dict[str, GuestOptions]]:
    """Return a plan and the options of each guest.

    Raises:
        PlanError: it has mistakes; all of them are in it, also those of the guests' options.
        UsageError: it can't be read.
    """
    found: dict[str, GuestOptions] = {}

    def check(guest: GuestPlan, wrong: Collection[str]) -> list[V2VError]:
        steps, mistakes = _by_step(guest, wrong)
        if len(steps) == len(_STEPS):
            found[guest.name] = GuestOptions(**steps)
        return mistakes

    return read_plan(path, check), found


def options_of_all(guests: Iterable[GuestPlan]) -> dict[str, GuestOptions]:
    """Return the options of guests whose plan was read before; password files are read again.

    Raises:
        V2VError: a password file can't be read any more.
    """
    found = {}
    for guest in guests:
        try:
            found[guest.name] = options_of(guest)
        except V2VError as error:
            error.locate(guest=guest.name)
            raise
    return found


def options_of(guest: GuestPlan) -> GuestOptions:
    """Return what a guest's command line says.

    Raises:
        V2VError: it is wrong.
    """
    found, mistakes = _by_step(guest)
    if mistakes:
        raise mistakes[0]
    return GuestOptions(**found)


def _by_step(
    guest: GuestPlan, wrong: Collection[str] = ()
) -> tuple[dict[str, Any], list[V2VError]]:
    """Return the options of each step, and what is wrong with those of the others.

    Steps that read a setting in ``wrong`` are left out. ``options`` may say something to each.
    """
    found: dict[str, Any] = {}
    mistakes: list[V2VError] = []
    for step, parts, options in _STEPS:
        if any(part.rstrip("_") in wrong for part in (*parts, "options")):
            continue
        others = {name: empty for name, empty in _EMPTY.items() if name not in parts}
        try:
            words = virt_v2v.read(guest.model_copy(update=others).words())
            _refuse_what_is_not_for_many(words)
            found[step] = options(words)
        except V2VError as error:
            mistakes.append(error)
    return found, mistakes


def _refuse_what_is_not_for_many(words: virt_v2v.Words) -> None:
    virt_v2v.refuse_not_built(words)
    for option, instead in _NOT_FOR_MANY:
        if words.has(option) or (
            option == "--machine-readable" and words.machine_readable is not None
        ):
            raise UsageError(f"{option} can't be an option of a guest in a batch", hint=instead)
    if words.wants_help or words.wants_version:
        raise UsageError("--help and --version are no options of a guest in a batch")
    for key in words.options.get("--key", []):
        if key.split(":")[1:2] == ["key"]:  # never quoted
            raise UsageError(
                "a passphrase (ID:key:…) can't stand in a plan, which is kept with the run",
                hint='put it into a file that only you can read: keys = ["ID:file:FILE"]',
            )


def named_guests(known: Collection[str], names: Iterable[str], run: str) -> list[str]:
    """Return the guests of a run that a person names, all where none is.

    Raises:
        UsageError: some are not of this run; all of them are told.
    """
    wanted = list(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        told = ", ".join(f"‘{name}’" for name in unknown)
        hint = f"v2v-async batch status {run} --json lists them"
        if near := get_close_matches(unknown[0], known, n=1):
            hint = f"did you mean ‘{near[0]}’? {hint}"
        raise UsageError(f"the run has no guest {told}", hint=hint)
    return wanted or list(known)
