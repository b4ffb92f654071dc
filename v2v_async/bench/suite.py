"""Suites of scenarios: what is copied, from and to which servers, by whom, and what is promised.

A suite is a TOML file; docs/benchmarks.md describes it. Command lines hold ``{placeholders}``. They
are split into words before these are filled in, so that a path with a space stays one word.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from v2v_async.errors import UsageError
from v2v_async.units import MIB, parse_size

SUITES = Path(__file__).parent / "suites"
DEFAULT_SUITE = SUITES / "promises.toml"

OURS = "ours"
Kind = Literal["ours", "nbdcopy", "qemu-img"]

SERVER_PLACEHOLDERS = frozenset({"socket", "file", "size"})
CLIENT_PLACEHOLDERS = frozenset(
    {"ours", "nbdcopy", "qemu_img", "flush", "source", "target", "pairs"}
)


def split(command: str) -> list[str]:
    """Split a command line into words as a shell does; nothing is expanded."""
    return shlex.split(command)


def fill(words: Sequence[str], values: Mapping[str, Sequence[str]]) -> list[str]:
    """Fill in placeholders. One that is a whole word may become several words, or none."""
    filled: list[str] = []
    for word in words:
        whole = re.fullmatch(r"\{(\w+)\}", word)
        if whole is not None:
            filled += values[whole[1]]
        else:
            filled.append(re.sub(r"\{(\w+)\}", lambda m: " ".join(values[m[1]]), word))
    return filled


def placeholders(command: str) -> set[str]:
    """Return the names of the placeholders in a command line."""
    return set(re.findall(r"\{(\w+)\}", command))


def _checked(allowed: frozenset[str]) -> AfterValidator:
    def check(command: str) -> str:
        if not split(command):
            raise ValueError("the command line is empty")
        if unknown := placeholders(command) - allowed:
            names = ", ".join(f"{{{name}}}" for name in sorted(unknown))
            known = ", ".join(f"{{{name}}}" for name in sorted(allowed))
            raise ValueError(f"no such placeholder: {names} (there are {known})")
        return command

    return AfterValidator(check)


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
ServerLine = Annotated[str, _checked(SERVER_PLACEHOLDERS)]
ClientLine = Annotated[str, _checked(CLIENT_PLACEHOLDERS)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pieces(_Part):
    """Content in pieces: ``run`` bytes of data at every ``every`` bytes, up to ``until``."""

    run: Size
    every: Size
    until: Size

    @model_validator(mode="after")
    def _fits(self) -> Pieces:
        if self.run > self.every:
            raise ValueError("‘run’ is longer than ‘every’")
        return self


class Disk(_Part):
    """``count`` disks of one size and content, ``all``: random data, ``none``: a hole."""

    size: Size
    count: PositiveInt = 1
    content: Literal["all", "none"] | Pieces = "all"

    @property
    def data_bytes(self) -> int:
        """How much of one disk is data."""
        if isinstance(self.content, Pieces):
            until = min(self.content.until, self.size)
            return -(-until // self.content.every) * self.content.run
        return self.size if self.content == "all" else 0

    def scaled(self, factor: float) -> Disk:
        """Return it made larger or smaller, in whole MiB. Pieces keep their length."""
        changes: dict[str, object] = {"size": _scale(self.size, factor)}
        if isinstance(self.content, Pieces):
            until = _scale(self.content.until, factor)
            changes["content"] = self.content.model_copy(update={"until": until})
        return self.model_copy(update=changes)


class Contestant(_Part):
    """How one program does the work.

    A command with ``{pairs}`` gets all disks at once. One with ``{source}`` and ``{target}`` runs
    once for each disk, in their order, ``parallel`` at a time.
    """

    command: ClientLine
    parallel: PositiveInt = 1

    @property
    def is_per_disk(self) -> bool:
        """Whether it runs once for each disk."""
        return bool(placeholders(self.command) & {"source", "target"})


def _contestant(value: object) -> object:
    return {"command": value} if isinstance(value, str) else value


Contestants = dict[Kind, Annotated[Contestant, BeforeValidator(_contestant)]]


class Promise(_Part):
    """What is wanted of ``ours``; None where nothing is.

    ``speed``: at least so many times as fast as nbdcopy. ``aim``: better still. ``cpu``: at most so
    many times nbdcopy's CPU time. ``cpu_seconds``, ``memory`` (bytes): at most that.
    """

    speed: PositiveFloat | None = None
    aim: PositiveFloat | None = None
    cpu: PositiveFloat | None = None
    cpu_seconds: PositiveFloat | None = None
    memory: Size | None = None


class Scenario(_Part):
    """One kind of copy. Without servers it is only programs that run, or ``ends`` are given."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_-]+$")]
    title: str
    disk: tuple[Disk, ...] = ()
    source: ServerLine | None = None
    target: ServerLine | None = None
    target_format: Literal["raw", "qcow2"] = "raw"
    fresh: bool = True
    flush: bool = False
    limit_s: PositiveFloat = 1800.0
    contestants: Contestants = {}
    without: tuple[Kind, ...] = ()
    promise: Promise = Promise()
    ends: tuple[tuple[str, str], ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Scenario:
        if (self.source is None) != (self.target is None):
            raise ValueError("‘source’ and ‘target’ servers go together")
        if (self.source is None) != (not self.disk):
            raise ValueError("servers need a [[scenario.disk]], and a disk needs servers")
        return self

    @property
    def disks(self) -> list[Disk]:
        """Every disk by itself, in order."""
        return [disk for disk in self.disk for _ in range(disk.count)]

    @property
    def has_source_file(self) -> bool:
        """Whether the source is served from a file that has to be made."""
        return self.source is not None and "file" in placeholders(self.source)

    @property
    def has_target_file(self) -> bool:
        """Whether the target is kept in a file."""
        return self.target is not None and "file" in placeholders(self.target)

    def scaled(self, factor: float) -> Scenario:
        """Return it with larger or smaller disks."""
        return self.model_copy(update={"disk": tuple(disk.scaled(factor) for disk in self.disk)})


class Suite(_Part):
    """A suite file. ``contestants`` hold for every scenario that has not its own."""

    version: Literal[1]
    title: str
    contestants: Contestants = {}
    scenario: Annotated[tuple[Scenario, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_consistent(self) -> Suite:
        names = [scenario.name for scenario in self.scenario]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two scenarios are named ‘{min(twice)}’")
        for scenario in self.scenario:
            if not self.contestants_of(scenario):
                raise ValueError(f"scenario ‘{scenario.name}’ has no contestant")
        return self

    def contestants_of(self, scenario: Scenario) -> Contestants:
        """Return who takes part in a scenario."""
        merged: Contestants = {**self.contestants, **scenario.contestants}
        return {kind: made for kind, made in merged.items() if kind not in scenario.without}

    def chosen(self, names: Sequence[str]) -> list[Scenario]:
        """Return the scenarios of these names, all for none, in the suite's order.

        Raises:
            UsageError: there is no such scenario.
        """
        known = [scenario.name for scenario in self.scenario]
        for name in names:
            if name not in known:
                raise UsageError(f"no scenario ‘{name}’", hint="one of " + ", ".join(known))
        return [made for made in self.scenario if not names or made.name in names]


def load(path: Path = DEFAULT_SUITE) -> Suite:
    """Read a suite file.

    Raises:
        UsageError: it can't be read or is wrong; the message says where.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="give a suite file (TOML)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from error
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {_explain(error, content)}", hint=_MORE) from error


_MORE = "docs/benchmarks.md describes the file"


def _explain(error: ValidationError, content: Mapping[str, Any]) -> str:
    """Say the first fault: where in words of the file, and what."""
    faults = error.errors(include_url=False)
    # A misspelt key explains the one that is missed for it.
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    words: list[str] = []
    inside = content.get("scenario")
    place = list(first["loc"])
    if len(place) > 1 and place[0] == "scenario" and isinstance(place[1], int):
        entry = inside[place[1]] if isinstance(inside, list) else {}
        name = entry.get("name") if isinstance(entry, dict) else None
        words.append(f"scenario ‘{name}’" if name else f"scenario {place[1] + 1}")
        place = place[2:]
    key = ".".join(str(part) for part in place if part not in ("Pieces", "literal['all','none']"))
    if key:
        words.append(f"‘{key}’")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "there is no such key"
    return f"{', '.join(words)}: {reason}" if words else reason


def _scale(size: int, factor: float) -> int:
    return max(1, round(size * factor / MIB)) * MIB
