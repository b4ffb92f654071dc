"""A plan as a file, TOML or YAML: read, put together with its defaults, and checked.

::

    text ─ TOML or YAML ─> tables ─ defaults ─ patterns (glob, csv) ─> Plan
             lines.py: the line of each

All mistakes are told at once, each with its line.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from v2v_async.batch.plan.lines import Lines, Place, toml_lines, yaml_lines
from v2v_async.batch.plan.mistakes import SETTINGS, meant, mistakes_of, wrong_settings
from v2v_async.batch.plan.model import GuestDefaults, GuestPlan, Plan
from v2v_async.errors import UsageError, V2VError

_PATTERNS = ("glob", "csv")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
"""A brace that is meant, a column, or a brace that stands alone."""
_MOST_NAMES = 3
Table = dict[str, Any]
Check = Callable[[GuestPlan, Collection[str]], Iterable[V2VError]]
"""Returns what more is wrong with a guest. Of the settings given beside it nothing is known: they
are wrong, and have their defaults."""


class PlanError(UsageError):
    """A plan with mistakes. ``mistakes`` are lines for a person: ``FILE:LINE: what``."""

    def __init__(self, path: Path, mistakes: list[str]) -> None:
        count = "one mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__(
            f"‘{path}’ has {count}:\n" + "\n".join(f"  {each}" for each in mistakes),
            hint="v2v-async batch init writes a plan with comments",
        )
        self.mistakes = mistakes


class _Mistakes:
    """Collects what is wrong, each with its line, and of which guests where a line has several."""

    def __init__(self, path: Path, lines: Lines) -> None:
        self._path = path
        self._lines = lines
        self._found: dict[tuple[int, str], dict[str, None]] = {}

    def add(
        self, place: Place, text: str, line: int | None = None, *, guest: object = None
    ) -> None:
        """Note a mistake at a place of the document (or at another ``line``)."""
        line = self._lines.line(place) if line is None else line
        guests = self._found.setdefault((line, text), {})
        if isinstance(guest, str) and guest:
            guests[guest] = None

    def raise_if_any(self) -> None:
        """Raise PlanError if there are some."""
        if self._found:
            raise PlanError(self._path, [self._told(*each) for each in sorted(self._found)])

    def _told(self, line: int, text: str) -> str:
        guests = list(self._found[line, text])
        names = ", ".join(guests[:_MOST_NAMES])
        if len(guests) > _MOST_NAMES:
            names += f" and {len(guests) - _MOST_NAMES} more"
        return f"{self._path.name}:{line}: {f'{names}: ' if guests else ''}{text}"


def read_plan(path: Path, check: Check | None = None) -> Plan:
    """Return the plan in a file; its patterns and relative names are seen from its folder.

    ``check`` is given each guest, and returns what more is wrong with it.

    Raises:
        PlanError: it has mistakes; all of them are in it.
        UsageError: it can't be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the plan ‘{path}’ can't be read: {reason}") from error
    document, lines = _parsed(path, text)
    mistakes = _Mistakes(path, lines)
    for place, line in lines.twice:
        name = ".".join(str(part) for part in place if not isinstance(part, int))
        mistakes.add(place, f"{name}: is there twice, first in line {lines.line(place)}", line)
    defaults, wrong = _checked(document.pop("defaults", {}), mistakes)
    if any(meant(name) == "defaults" for name in document):
        wrong = SETTINGS
    guests: list[Table] = []
    places: list[Place] = []
    entries = document.get("guests", [])
    if not isinstance(entries, list) or not entries:
        # Where they are misspelt that is told.
        if "guests" in document or all(meant(name) != "guests" for name in document):
            mistakes.add(("guests",), "no guests: write at least one [[guests]]")
        entries = []
    for index, entry in enumerate(entries):
        place = ("guests", index)
        if not isinstance(entry, dict):
            mistakes.add(place, "a guest is a table with a name and a source")
            continue
        for guest in _expanded(entry, path.parent, place, mistakes):
            guests.append(_merged(defaults, guest))
            places.append(place)
    plan = _validated({**document, "guests": guests}, places, mistakes)
    _check_names(guests, places, mistakes)
    if check is not None:
        _check_each(guests, places, wrong, check, mistakes)
    mistakes.raise_if_any()
    assert plan is not None  # without mistakes it was made
    return plan


def _parsed(path: Path, text: str) -> tuple[Table, Lines]:
    """Return the document and where its parts are."""
    try:
        if path.suffix in (".yaml", ".yml"):
            document, lines = yaml.safe_load(text), yaml_lines(text)
        else:
            document, lines = tomllib.loads(text), toml_lines(text)
    except tomllib.TOMLDecodeError as error:
        raise PlanError(path, [f"{path.name}: {error}"]) from error
    except yaml.YAMLError as error:
        raise PlanError(path, [f"{path.name}: {' '.join(str(error).split())}"]) from error
    if not isinstance(document, dict):
        raise PlanError(path, [f"{path.name}:1: a plan is a table with [[guests]]"])
    return document, lines


def _merged(defaults: Table, own: Table) -> Table:
    """Return the defaults with a guest's own words over them, table by table."""
    merged = dict(defaults)
    for name, value in own.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _expanded(entry: Table, folder: Path, place: Place, mistakes: _Mistakes) -> Iterator[Table]:
    """Yield the guests that an entry stands for: itself, a file each, or a row each."""
    kinds = [name for name in _PATTERNS if name in entry]
    rest = {name: value for name, value in entry.items() if name not in _PATTERNS}
    if not kinds:
        yield rest
        return
    if len(kinds) > 1:
        mistakes.add(place, "glob and csv exclude each other: write two [[guests]]")
        return
    kind = kinds[0]
    if not isinstance(entry[kind], str):
        mistakes.add((*place, kind), f"{kind} is a text")
        return
    rows = _files(entry[kind], folder) if kind == "glob" else _rows(folder / entry[kind])
    found = False
    try:
        for row in rows:
            found = True
            named = {"name": "{name}", **rest}
            if kind == "glob" and isinstance(named.setdefault("input", {}), dict):
                named["input"] = {"source": "{path}", **named["input"]}
            wrong: list[tuple[Place, str]] = []
            made = _filled(named, row, place, wrong)
            for where, text in wrong:
                mistakes.add(where, text)
            if wrong:
                return  # with each row the same
            yield made
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        mistakes.add((*place, kind), f"‘{entry[kind]}’ can't be read: {reason}")
    else:
        if not found:
            mistakes.add((*place, kind), f"‘{entry[kind]}’ gives no guests")


def _files(pattern: str, folder: Path) -> Iterator[dict[str, str]]:
    for found in sorted(glob(str(folder / pattern), recursive=True)):
        path = Path(found)
        yield {"path": str(path), "name": path.stem, "file": path.name, "folder": path.parent.name}


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file, strict=True):
            yield {name.strip(): (value or "").strip() for name, value in row.items() if name}


def _filled(value: Any, row: dict[str, str], place: Place, wrong: list[tuple[Place, str]]) -> Any:
    """Return the value with each ``{column}`` in its texts replaced.

    Where there is no such column, or a brace stands alone, that is added to ``wrong``: of each
    text what comes first.
    """
    before = len(wrong)

    def one(found: re.Match[str]) -> str:
        braces, name = found[0], found[1]
        if name is None and len(braces) == 2:
            return braces[0]
        if name in row:
            return row[name]
        known = ", ".join(f"{{{each}}}" for each in row)
        text = f"{braces} is neither a column nor a known word: {known}"
        if name is None:
            text = f"‘{braces}’ stands alone: a column is {{name}}, a brace itself ‘{braces * 2}’"
        if len(wrong) == before:
            wrong.append((place, text))
        return braces

    if isinstance(value, str):
        return _BRACES.sub(one, value)
    if isinstance(value, list):
        return [_filled(each, row, (*place, index), wrong) for index, each in enumerate(value)]
    if isinstance(value, dict):
        return {name: _filled(each, row, (*place, name), wrong) for name, each in value.items()}
    return value


def _checked(defaults: Any, mistakes: _Mistakes) -> tuple[Table, frozenset[str]]:
    """Return what is right of the defaults, and the settings in which something is wrong.

    That is told once, and not again for each guest.
    """
    try:
        GuestDefaults.model_validate(defaults)
    except ValidationError as error:
        for place, text in mistakes_of(error):
            mistakes.add(("defaults", *place), _named(place, text))
        wrong = wrong_settings(error)
        if not isinstance(defaults, dict):
            return {}, wrong
        known = SETTINGS - wrong
        return {name: value for name, value in defaults.items() if name in known}, wrong
    return defaults, frozenset()


def _validated(document: Table, places: list[Place], mistakes: _Mistakes) -> Plan | None:
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        counts = Counter(places)
        for place, text in mistakes_of(error):
            where, guest = place, None
            if place[:1] == ("guests",) and len(place) > 1 and isinstance(place[1], int):
                entry = places[place[1]]
                where = (*entry, *place[2:])
                # A line that stands for one guest need not say which.
                guest = document["guests"][place[1]].get("name") if counts[entry] > 1 else None
            mistakes.add(where, _named(place, text), guest=guest)
        return None


def _named(place: Place, text: str) -> str:
    name = ".".join(str(part) for part in place if not isinstance(part, int))
    return f"{name}: {text}" if name else text


def _check_names(guests: list[Table], places: list[Place], mistakes: _Mistakes) -> None:
    seen: set[str] = set()
    for guest, place in zip(guests, places, strict=True):
        name = guest.get("name")
        if not isinstance(name, str):
            continue
        if name in seen:
            mistakes.add((*place, "name"), f"two guests are named ‘{name}’")
        seen.add(name)


def _check_each(
    guests: list[Table],
    places: list[Place],
    wrong_for_all: frozenset[str],
    check: Check,
    mistakes: _Mistakes,
) -> None:
    for table, place in zip(guests, places, strict=True):
        wrong = wrong_for_all
        try:
            GuestPlan.model_validate(table)
        except ValidationError as error:
            wrong |= wrong_settings(error)
        known = {name: value for name, value in table.items() if name not in wrong}
        if wrong >= SETTINGS:
            continue  # of nothing is it known what is meant
        guest = GuestPlan.model_validate({"name": "?", **known})
        for mistake in check(guest, wrong):
            hint = f" ({mistake.hint})" if mistake.hint else ""
            mistakes.add(place, f"{mistake.message}{hint}", guest=table.get("name"))
