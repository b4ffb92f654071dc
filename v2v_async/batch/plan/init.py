"""The plan that ``v2v-async batch init`` writes: every setting with its default, in comments.

::

    models (plan.py) ─ names, defaults, examples, descriptions ─┐
    init_examples.py ─ guests of several kinds ─────────────────┴─> Table ─> TOML or YAML

In TOML a line that begins with ‘#’ and no space is a setting that is commented out.
"""

from __future__ import annotations

import shlex
from datetime import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from v2v_async.batch.plan.init_examples import FIRST, GUESTS, LIMITED
from v2v_async.batch.plan.init_text import Item, Note, Setting, Table, toml_text, yaml_text
from v2v_async.batch.plan.model import GroupLimits, GuestDefaults, Limits, Retries, Window
from v2v_async.batch.plan.schema import PlanFile, schema_address
from v2v_async.errors import UsageError

Syntax = Literal["toml", "yaml"]

_HEAD = """\
A batch of guests. Fill in what is marked ‘<--’; look at it, which moves nothing; run it:

    v2v-async batch run {name} --dry-run
    v2v-async batch run {name}

Settings that are commented out show their default, or an example where they have none.
{uncomment}
Sizes are written 512M or 1.5G (powers of 1024), rates 50MB/s or 400Mbit/s, durations 30s, 10m or
1h30m. Mistakes are told all at once, each with its line."""
_UNCOMMENT: dict[Syntax, str] = {
    "toml": "Remove the ‘#’ of a line that begins with ‘#’ and no space to use it.",
    "yaml": "To use one, remove its ‘#’, and that of the lines that it is below of.",
}
_SCHEMA: dict[Syntax, str] = {
    "toml": "#:schema {}",
    "yaml": "# yaml-language-server: $schema={}",
}
_DEFAULTS = (
    "What holds for all guests. A guest's own word wins, key by key; what is behind each\n"
    "setting is virt-v2v(1)'s name for it."
)
_LIMITS = "What all guests together may take."
_WINDOWS = (
    "Parts of the week in which other limits hold, in local time: fewer copies while people\n"
    "work, none of a group at night. Where two are open, the later one in this file wins."
)
_RETRIES = (
    "A guest that fails is tried again, from where it was. What would fail again (a wrong plan,\n"
    "no operating system, a full disk) is not."
)


def init_text(syntax: Syntax, name: str, *, schema: str | None = None) -> str:
    """Return the text of a plan to fill in; ``name`` is its file's, for the commands in it.

    ``schema``: where editors find the JSON Schema.
    """
    shown = shlex.quote(name if name.isprintable() else f"plan.{syntax}")
    head = _HEAD.format(name=shown, uncomment=_UNCOMMENT[syntax])
    text = (toml_text if syntax == "toml" else yaml_text)((Note(head), *_document()))
    return text if schema is None else f"{_SCHEMA[syntax].format(schema)}\n{text}"


def write_init(path: Path) -> None:
    """Write a plan to fill in: YAML where the name says so, else TOML.

    Raises:
        UsageError: there is something of that name, or it can't be written.
    """
    syntax: Syntax = "yaml" if path.suffix in (".yaml", ".yml") else "toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(init_text(syntax, str(path), schema=schema_address()))
    except FileExistsError as error:
        raise UsageError(
            f"‘{path}’ is there already", hint="name another file, or remove it first"
        ) from error
    except OSError as error:
        raise UsageError(f"‘{path}’ can't be written: {error.strerror}") from error


def _document() -> tuple[Note | Setting | Table | Item, ...]:
    top = {each.key: each for each in _settings(PlanFile) if isinstance(each, Setting)}
    return (
        Setting("name", "first-batch", top["name"].comment, is_active=True),
        top["version"],
        Table("defaults", _settings(GuestDefaults), _DEFAULTS),
        Item("guests", FIRST, "The guests, in any number and of any kinds.", is_active=True),
        *(Item("guests", settings, comment) for comment, settings in GUESTS),
        Table("limits", _limits(), _LIMITS),
        Item("windows", _settings(Window), _WINDOWS),
        Table("retries", _settings(Retries), _RETRIES),
    )


def _limits() -> tuple[Setting | Table, ...]:
    """Return the limits, those by name with an example of a name."""
    plain = [each for each in _settings(Limits) if isinstance(each, Setting)]
    described = {name: field.description for name, field in Limits.model_fields.items()}
    named = [
        Table(
            kind,
            (Table(name, _settings(GroupLimits), f"Limits {described[kind]}.", is_example=True),),
        )
        for kind, name in LIMITED.items()
    ]
    return (*plain, *named)


def _settings(model: type[BaseModel]) -> tuple[Setting | Table, ...]:
    """Return a model's settings: its own first, then those of its tables."""
    plain: list[Setting | Table] = []
    tables: list[Setting | Table] = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            tables.append(Table(key, _settings(kind), kind.__doc__ or ""))
        elif not _holds_tables(kind):
            plain.append(Setting(key, _shown(field), _comment(field)))
    return (*plain, *tables)


def _holds_tables(kind: Any) -> bool:
    """Whether a setting is a list of tables, or tables by name: they are shown in full."""
    return get_origin(kind) in (list, dict) and any(
        isinstance(each, type) and issubclass(each, BaseModel) for each in get_args(kind)
    )


def _shown(field: FieldInfo) -> Any:
    """Return the value to show; where a default is written with a unit, the example is it."""
    value = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    return time.fromisoformat(value) if field.annotation is time else value


def _comment(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        return f"{text} (must be given)"
    has_default = field.default not in (None, [], {})
    return text if has_default or "(default" in text else f"{text} (no default)"
