"""On which line of a TOML or YAML document a value is, for messages.

The parsers tell values without their lines (tomllib) or with them only before they are values
(yaml), so this looks once more, for lines alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import yaml

Place = tuple[str | int, ...]
"""Keys and indexes from the top: ``("guests", 2, "input", "type")``."""

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_QUOTES = ('"""', "'''")


class Lines:
    """Lines (from 1) of the places of a document.

    ``twice``: places of keys that stand there again, with the line of that, where the parser of
    the format does not refuse it by itself.
    """

    def __init__(self, known: dict[Place, int], twice: Iterable[tuple[Place, int]] = ()) -> None:
        self._known = known
        self.twice = tuple(twice)

    def line(self, place: Place) -> int:
        """Return the line of a place, or of what is around it where it is not known itself."""
        while place and place not in self._known:
            place = place[:-1]
        return self._known.get(place, 1)


def toml_lines(text: str) -> Lines:
    """Find tables and keys at the beginning of lines; a value inside another has its line."""
    known: dict[Place, int] = {}
    counts: dict[Place, int] = {}
    table: Place = ()
    quote = ""
    for number, line in enumerate(text.splitlines(), 1):
        if quote:
            quote = "" if quote in line else quote
            continue
        if header := _HEADER.fullmatch(line):
            table = _table(_parts(header[2]), counts, is_array=header[1] == "[[")
            for length in range(1, len(table) + 1):
                known.setdefault(table[:length], number)
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            for length in range(1, len(parts) + 1):
                known.setdefault((*table, *parts[:length]), number)
            quote = next((each for each in _QUOTES if line.count(each) == 1), "")
    return Lines(known)


def _parts(text: str) -> Place:
    return tuple(part.strip("\"'") for part in _PART.findall(text))


def _table(parts: Place, counts: dict[Place, int], *, is_array: bool) -> Place:
    """Return where a header leads: arrays of tables on the way stand at their last entry."""
    place: Place = ()
    for index, part in enumerate(parts):
        place = (*place, part)
        if is_array and index == len(parts) - 1:
            counts[place] = counts.get(place, -1) + 1
        if place in counts:
            place = (*place, counts[place])
    return place


def yaml_lines(text: str) -> Lines:
    """Take the lines of the nodes of a YAML document."""
    known: dict[Place, int] = {}
    twice: list[tuple[Place, int]] = []
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    waiting: list[tuple[Place, yaml.Node]] = [] if root is None else [((), root)]
    seen: set[int] = set()
    while waiting:
        place, node = waiting.pop()
        known.setdefault(place, node.start_mark.line + 1)
        if id(node) in seen:  # an alias: its parts have their lines already
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names: set[tuple[str, str]] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    continue  # a list or a table as a key, which no setting is
                if (key.tag, key.value) in names:
                    twice.append(((*place, key.value), line))
                names.add((key.tag, key.value))
                known.setdefault((*place, key.value), line)
                waiting.append(((*place, key.value), value))
        elif isinstance(node, yaml.SequenceNode):
            waiting += [((*place, index), value) for index, value in enumerate(node.value)]
    return Lines(known, twice)
