"""The JSON Schema of a plan as a person writes it, for editors: docs/schema/plan.json.

It is of the file: with ``[defaults]``, and guests that ``glob`` and ``csv`` stand for, in which a
text with a ``{column}`` may stand for anything. :mod:`file` reads such files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter

from v2v_async.batch.plan.model import Batch, GuestDefaults

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = "#/$defs/"
_TELLING = ("title", "description", "default", "examples")
_FILLED: Schema = {
    "type": "string",
    "pattern": r"\{[^{}]+\}",
    "description": "a column of the CSV, or what is known of a file",
}


class GuestEntry(GuestDefaults):
    """A guest, or a pattern that stands for several: its own words win over [defaults]."""

    name: str | None = Field(
        default=None,
        description="its label in this batch; with glob or csv a text with {columns} "
        "(default there: {name})",
        examples=["web1", "{folder}-{name}"],
    )
    glob: str | None = Field(
        default=None,
        description="a guest for each file: {path}, {name} (without suffix), {file} and {folder} "
        "are known, and its source is {path}",
        examples=["vms/*/*.vmx"],
    )
    csv: str | None = Field(
        default=None,
        description="a guest for each row of a CSV file; the first row names the {columns}",
        examples=["guests.csv"],
    )


class PlanFile(Batch):
    """A batch of guests: v2v-async batch init writes one with comments."""

    defaults: GuestDefaults = Field(
        default=GuestDefaults(), description="what holds for all guests that do not say otherwise"
    )
    guests: list[GuestEntry] = Field(
        min_length=1, description="what is to be converted: guests, and patterns for several"
    )


def plan_schema() -> Schema:
    """Return the schema of plan files."""
    made = TypeAdapter(PlanFile).json_schema(mode="validation")
    definitions: Schema = made["$defs"]
    entry = _with_columns(definitions.pop("GuestEntry"), definitions)
    own = {name: _as_text(entry["properties"].pop(name)) for name in ("name", "glob", "csv")}
    entry["properties"] = own | entry["properties"]
    entry["anyOf"] = [{"required": [name]} for name in own]
    entry["not"] = {"required": ["glob", "csv"]}
    definitions["GuestEntry"] = entry
    return {"$schema": _DIALECT, **_told_once(made)}


def schema_address() -> str | None:
    """Return where the published schema is on this machine; None where it was not installed."""
    path = Path(__file__).resolve().parents[3] / "docs" / "schema" / "plan.json"
    return path.as_uri() if path.is_file() else None


def _with_columns(schema: Schema, definitions: Schema) -> Schema:
    """Return the schema of a table in which texts with a column may stand for any value.

    Columns are filled into an entry, not into the defaults: what both have gets a definition of
    its own where it differs.
    """
    properties = {}
    for name, value in schema["properties"].items():
        properties[name] = value
        if reference := value.get("$ref"):
            inner = definitions[reference.removeprefix(_REFERENCE)]
            filled = _with_columns(inner, definitions)
            if filled != inner:
                own = f"{reference.removeprefix(_REFERENCE)}Entry"
                definitions[own] = filled
                properties[name] = {**value, "$ref": f"{_REFERENCE}{own}"}
        elif not _takes_any_text(value):
            around = {each: value[each] for each in _TELLING if each in value}
            bare = {each: value[each] for each in value if each not in _TELLING}
            branches = bare["anyOf"] if list(bare) == ["anyOf"] else [bare]
            properties[name] = {**around, "anyOf": [*branches, _FILLED]}
    return {**schema, "properties": properties}


def _takes_any_text(value: Schema) -> bool:
    """Whether a value may be any text, or consists of texts."""
    if value.get("type") == "object":  # of options: texts, or true
        return True
    branches = [value, *value.get("anyOf", ())]
    return any(
        each.get("type") == "string" and not each.keys() & {"pattern", "enum"}
        for branch in branches
        for each in (branch, branch.get("items", {}))
    )


def _as_text(value: Schema) -> Schema:
    """Return the schema of a text that is only left out, never null."""
    kept = {name: each for name, each in value.items() if name not in ("anyOf", "default")}
    return {**kept, "type": "string", "minLength": 1}


def _told_once(schema: Any) -> Any:
    """Return the schema without what tells an editor nothing: titles, defaults of no value."""
    if isinstance(schema, list):
        return [_told_once(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: _told_once(each) for name, each in schema.items() if not _is_noise(name, each)}
    if "pattern" in kept and "default" in kept:
        # The first example is the default as a person writes it.
        kept["default"] = kept["examples"][0]
    return kept


def _is_noise(name: str, value: Any) -> bool:
    # ‘ge’ and ‘gt’ are pydantic's own words for what ‘minimum’ says too.
    return (
        (name == "title" and isinstance(value, str))
        or (name == "default" and (value is None or isinstance(value, dict)))
        or (name in ("ge", "gt") and isinstance(value, int | float))
    )
