"""What pydantic finds wrong with a plan, in the words of who writes one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from v2v_async.batch.plan.lines import Place
from v2v_async.batch.plan.model import GuestPlan, Plan

_BRANCHES = {"str": "a text", "bool": "true or false", "list[str]": "a list of texts"}
"""Pydantic's names of the types that a setting may have, where there are several."""
_NO_PARTS = (*_BRANCHES, "function-before[<lambda>(), int]")
_WHOLE = "must be a whole number"
_TEXTS = {
    "missing": "is missing",
    "model_type": "is a table, with settings of its own",
    "dict_type": "is a table, with settings of its own",
    "list_type": "is a list: write it in [ ]",
    "string_type": "must be a text: write it in quotes",
    "string_too_short": "is empty",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "literal_error": "must be {expected}",
    "time_type": 'is a time of the day: "22:00"',
    "time_parsing": 'is a time of the day: "22:00"',
}
_TOP = (*Plan.model_fields, "defaults")
SETTINGS = frozenset(each.alias or name for name, each in GuestPlan.model_fields.items())
"""Everything that is said of a guest, by its name in a plan."""


def mistakes_of(error: ValidationError) -> Iterator[tuple[Place, str]]:
    """Yield each mistake with its place in the document. Of several types one is told."""
    several: dict[Place, list[str]] = {}
    for each in error.errors(include_url=False):
        location = each["loc"]
        branch = location[-1] if location else ""
        if branch in _BRANCHES and len(location) > 1:
            several.setdefault(location[:-1], []).append(_BRANCHES[str(branch)])
            continue
        if len(location) > 2 and location[-2] == "list[str]":
            # It is a list: that it is no text need not be told.
            several.pop(location[:-2], None)
        yield _place(location), _text(each)
    for location, kinds in several.items():
        yield _place(location), f"must be {' or '.join(kinds)}"


def meant(name: object, known: Iterable[str] = _TOP) -> str | None:
    """Return the table or setting (of a whole plan) that a misspelt one is most like."""
    near = get_close_matches(str(name), known, n=1, cutoff=0.75)
    return near[0] if near else None


def wrong_settings(error: ValidationError) -> frozenset[str]:
    """Return the settings of a guest, or of the defaults, in which something is wrong.

    All of them where nothing tells which one a misspelt name stands for.
    """
    found: set[str] = set()
    for each in error.errors(include_url=False):
        name = str(each["loc"][0]) if each["loc"] else ""
        near = name if name in SETTINGS else meant(name, SETTINGS)
        if near is None:
            return SETTINGS
        found |= {name, near}
    return frozenset(found)


def _place(location: tuple[str | int, ...]) -> Place:
    return tuple(part for part in location if part not in _NO_PARTS)


def _text(each: Any) -> str:
    if each["type"] == "extra_forbidden":
        near = meant(each["loc"][0]) if len(each["loc"]) == 1 else None
        if near is None:
            return "there is no such setting"
        is_array = isinstance(each["input"], list)
        return f"did you mean {f'[[{near}]]' if is_array else f'‘{near}’'}?"
    text = _TEXTS.get(each["type"])
    if text is None:
        return str(each["msg"]).removeprefix("Value error, ")
    return text.format_map(each.get("ctx") or {})
