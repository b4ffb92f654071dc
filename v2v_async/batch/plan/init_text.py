"""Documents with comments and settings that are commented out, as TOML and as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import time
from typing import Any

_WIDTH = 100
_COLUMN = 40
"""Where comments behind settings begin: most settings are shorter."""


@dataclass(frozen=True, slots=True)
class Note:
    """Lines said to the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Setting:
    """A key and its value."""

    key: str
    value: Any
    comment: str = ""
    is_active: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table: settings first, then tables. ``is_example``: its own name is one, too."""

    key: str
    entries: tuple[Setting | Table, ...]
    comment: str = ""
    is_example: bool = False

    @property
    def is_active(self) -> bool:
        """Whether anything in it is a setting that holds."""
        return any(each.is_active for each in self.entries)


@dataclass(frozen=True, slots=True)
class Item:
    """One table of a list of them; those of one ``key`` follow each other."""

    key: str
    entries: tuple[Setting | Table, ...]
    comment: str = ""
    is_active: bool = False


Entry = Note | Setting | Table | Item


def toml_text(document: Sequence[Entry]) -> str:
    """Return the document as TOML."""
    lines: list[str] = []
    for entry in document:
        if isinstance(entry, Note):
            lines += ["", *_said(entry.text), ""]
        elif isinstance(entry, Setting):
            lines += _toml_setting(entry)
        elif isinstance(entry, Table):
            lines += ["", *_toml_table(entry, ())]
        else:
            mark = "" if entry.is_active else "#"
            lines += ["", *_said(entry.comment), f"{mark}[[{entry.key}]]"]
            lines += _toml_item(entry.entries, "", is_active=entry.is_active)
    return _joined(lines)


def _toml_table(table: Table, above: tuple[str, ...]) -> Iterator[str]:
    path = (*above, table.key)
    settings = [each for each in table.entries if isinstance(each, Setting)]
    yield from _said(table.comment)
    if settings or table.comment:
        # A header alone changes nothing, and a setting below it needs it.
        mark = "#" if table.is_example else ""
        yield f"{mark}[{'.'.join(_key(part) for part in path)}]"
    for setting in settings:
        yield from _toml_setting(setting)
    for each in table.entries:
        if isinstance(each, Table):
            yield ""
            yield from _toml_table(each, path)


def _toml_item(
    entries: Sequence[Setting | Table], prefix: str, *, is_active: bool
) -> Iterator[str]:
    for each in entries:
        if isinstance(each, Table):
            yield from _toml_item(each.entries, f"{prefix}{each.key}.", is_active=is_active)
        else:
            key = f"{prefix}{each.key}"
            yield from _toml_setting(Setting(key, each.value, each.comment, is_active))


def _toml_setting(setting: Setting) -> Iterator[str]:
    mark = "" if setting.is_active else "#"
    yield from _commented(f"{mark}{setting.key} = {_toml_value(setting.value)}", setting.comment)


def _toml_value(value: Any) -> str:
    if isinstance(value, time):
        return value.isoformat()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(name)} = {_toml_value(each)}" for name, each in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(value, ensure_ascii=False)


def yaml_text(document: Sequence[Entry]) -> str:
    """Return the document as YAML."""
    lines: list[str] = []
    key = ""
    for entry in document:
        if isinstance(entry, Note):
            lines += ["", *_said(entry.text), ""]
        elif isinstance(entry, Item):
            lines += ["", *_said(entry.comment)]
            if entry.key != key:
                lines.append(f"{'' if entry.is_active else '#'}{entry.key}:")
            lines += _yaml_item(entry)
        else:
            lines += ["", *_yaml_entry(entry, 0)] if isinstance(entry, Table) else []
            lines += _yaml_entry(entry, 0) if isinstance(entry, Setting) else []
        key = entry.key if isinstance(entry, Item) else ""
    return _joined(lines)


def _yaml_item(item: Item) -> Iterator[str]:
    mark = "" if item.is_active else "#"
    is_first = True
    for each in item.entries:
        for line in _yaml_entry(each, 2, is_active=item.is_active):
            begin = f"{mark}    "
            # The first line of settings carries the dash.
            if is_first and line.startswith(begin):
                is_first = False
                line = f"{mark}  - {line.removeprefix(begin)}"
            yield line


def _yaml_entry(
    entry: Setting | Table, depth: int, *, is_active: bool | None = None
) -> Iterator[str]:
    is_active = entry.is_active if is_active is None else is_active
    begin = f"{'' if is_active else '#'}{'  ' * depth}{_key(entry.key)}:"
    if isinstance(entry, Setting):
        yield from _commented(f"{begin} {_yaml_value(entry.value)}", entry.comment)
        return
    yield from _said(entry.comment)
    yield begin
    for each in entry.entries:
        yield from _yaml_entry(each, depth + 1, is_active=is_active or None)


def _yaml_value(value: Any) -> str:
    if isinstance(value, time):
        return json.dumps(value.isoformat())
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml_value, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_key(name)}: {_yaml_value(each)}" for name, each in value.items())
        return f"{{{pairs}}}"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name)


def _said(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield f"# {line}".rstrip()


def _commented(line: str, comment: str) -> Iterator[str]:
    if not comment:
        yield line
    elif max(_COLUMN, len(line) + 1) + len(comment) + 2 <= _WIDTH:
        yield f"{line:<{_COLUMN - 1}} # {comment}"
    else:
        yield f"# {comment}:"
        yield line


def _joined(lines: list[str]) -> str:
    """Return the lines as a text without empty lines at its ends or two in a row."""
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    return text.strip("\n") + "\n"
