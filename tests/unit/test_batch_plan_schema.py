"""The published schema of plan files says what the reader says: right is right, wrong is wrong."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from tests.conftest import ROOT
from tests.unit.test_batch_init import SYNTAXES, everything, load
from tests.unit.test_batch_plan import GOOD
from v2v_async.batch.plan.file import PlanError, read_plan
from v2v_async.batch.plan.init import Syntax, init_text
from v2v_async.batch.plan.schema import plan_schema
from v2v_async.units import parse_duration, parse_rate, parse_size

SCHEMA = json.loads((ROOT / "docs" / "schema" / "plan.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def as_json(value: Any) -> Any:
    """Return what an editor's validator is given: times are texts."""
    if isinstance(value, dict):
        return {name: as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return value.isoformat() if isinstance(value, time) else value


def is_valid(document: Any) -> bool:
    return bool(VALIDATOR.is_valid(as_json(document)))


def is_read(folder: Path, document: Any) -> bool:
    """Whether the reader takes a document, written as YAML."""
    (folder / "a.img").touch()
    (folder / "names.csv").write_text("name,n,yes\nweb,3,true\n")
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        read_plan(path)
    except PlanError:
        return False
    return True


def test_it_is_a_schema_and_the_published_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert plan_schema() == SCHEMA


def every(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema of each property."""
    if isinstance(schema, dict):
        for name, each in schema.get("properties", {}).items():
            yield f"{path}.{name}", each
        for name, each in schema.items():
            yield from every(each, f"{path}.{name}")
    elif isinstance(schema, list):
        for each in schema:
            yield from every(each, path)


def test_every_setting_is_described_and_its_examples_are_right() -> None:
    found = dict(every(SCHEMA))
    assert len(found) > 70
    for path, each in found.items():
        told = each
        if reference := each.get("$ref"):
            told = SCHEMA["$defs"][reference.rpartition("/")[2]]
        assert "description" in told, path
        whole = {**each, "$defs": SCHEMA["$defs"]}
        for example in [
            *each.get("examples", ()),
            *([each["default"]] if "default" in each else []),
        ]:
            Draft202012Validator(whole).validate(example)
    text = json.dumps(SCHEMA)
    assert '"ge"' not in text
    assert '"title"' not in text


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_init_writes_is_valid(syntax: Syntax) -> None:
    VALIDATOR.validate(as_json(load(syntax, init_text(syntax, "p"))))
    VALIDATOR.validate(as_json(load(syntax, everything(syntax))))


def test_a_whole_plan_is_valid() -> None:
    VALIDATOR.validate(as_json(tomllib.loads(GOOD)))


GUEST = {"name": "a"}
WINDOW = {"begin": "08:00", "end": "18:00:30"}


def plan(**changes: Any) -> dict[str, Any]:
    return {"guests": [GUEST], **changes}


RIGHT = {
    "the least": plan(),
    "version": plan(version=1),
    "several guests": plan(guests=[GUEST, {"name": "b", "priority": -3}]),
    "glob alone": plan(guests=[{"glob": "*.img"}]),
    "csv alone": plan(guests=[{"csv": "names.csv"}]),
    "columns": plan(
        guests=[
            {
                "csv": "names.csv",
                "name": "{name}-new",
                "priority": "{n}",
                "memory": "{n}G",
                "copy": {"verify": "{yes}", "retries": "{n}"},
                "input": {"source": ["{name}", "b"], "options": {"x": "{n}", "y": True}},
            }
        ]
    ),
    "a source": plan(guests=[{"name": "a", "input": {"source": "x"}}]),
    "sources": plan(guests=[{"name": "a", "input": {"source": ["x", "y"]}}]),
    "null": plan(guests=[{"name": "a", "group": None}]),
    "sizes": plan(limits={"memory": "1.5G", "scratch": 1000, "bytes_in_flight": "64MiB"}),
    "rates": plan(limits={"bandwidth": 1, "groups": {"a": {"bandwidth": "400Mbit/s"}}}),
    "durations": plan(retries={"delay": 1.5, "longest_delay": "1h 30m"}),
    "window": plan(windows=[WINDOW, {**WINDOW, "days": ["sat"], "disks": 0, "group": "a"}]),
    "defaults": plan(defaults={"output": {"allocation": "sparse"}, "copy": {"verify": True}}),
}

WRONG = {
    "no guests": {},
    "empty guests": plan(guests=[]),
    "guests of another kind": plan(guests="a"),
    "a guest of another kind": plan(guests=["a"]),
    "version": plan(version=2),
    "no name": plan(guests=[{"priority": 1}]),
    "empty name": plan(guests=[{"name": ""}]),
    "null as a name": plan(guests=[{"name": None}]),
    "glob and csv": plan(guests=[{"glob": "*.img", "csv": "names.csv"}]),
    "glob of another kind": plan(guests=[{"glob": ["*.img"]}]),
    "unknown setting": plan(colour="red"),
    "unknown setting of a guest": plan(guests=[{"name": "a", "colour": "red"}]),
    "unknown setting of an input": plan(guests=[{"name": "a", "input": {"tipe": "x"}}]),
    "unknown limit": plan(limits={"hosts": {"a": {"conections": 3}}}),
    "priority": plan(guests=[{"name": "a", "priority": "high"}]),
    "columns in the defaults": plan(defaults={"priority": "{n}"}),
    "conversions": plan(limits={"conversions": 0}),
    "size": plan(limits={"memory": "12X"}),
    "negative size": plan(limits={"memory": -1}),
    "rate": plan(limits={"bandwidth": "fast"}),
    "no rate": plan(limits={"bandwidth": 0}),
    "duration": plan(retries={"delay": "soon"}),
    "negative duration": plan(retries={"delay": -1}),
    "time": plan(windows=[{**WINDOW, "begin": "8 o'clock"}]),
    "a time that YAML took for a number": plan(windows=[{**WINDOW, "begin": 1320}]),
    "no end": plan(windows=[{"begin": "08:00"}]),
    "day": plan(windows=[{**WINDOW, "days": ["sunday"]}]),
    "allocation": plan(guests=[{"name": "a", "output": {"allocation": "thin"}}]),
    "an option of another kind": plan(guests=[{"name": "a", "input": {"options": {"x": [1]}}}]),
    "text for options": plan(guests=[{"name": "a", "input": {"options": "{n}"}}]),
    "text for a table": plan(defaults={"input": "disk"}),
    "retries": plan(defaults={"copy": {"retries": -1}}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_is_right(tmp_path: Path, name: str) -> None:
    VALIDATOR.validate(RIGHT[name])
    assert is_read(tmp_path, RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_wrong(tmp_path: Path, name: str) -> None:
    assert not is_valid(WRONG[name])
    assert not is_read(tmp_path, WRONG[name])


def test_a_time_without_quotes_in_yaml_is_told(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("guests: [{name: a}]\nwindows:\n- begin: 22:00\n  end: 06:00\n")
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert caught.value.mistakes == [
        'plan.yaml:3: windows.begin: write the time in quotes: "22:00"'
    ]


def pattern_of(place: tuple[str, str]) -> re.Pattern[str]:
    """Return the pattern of a setting that is a number with a unit."""
    table, name = place
    value = SCHEMA["$defs"][table]["properties"][name]
    branches = [value, *value.get("anyOf", ())]
    [found] = [each["pattern"] for each in branches if "pattern" in each]
    return re.compile(found, re.ASCII)  # as JavaScript has it


UNITS = st.text(alphabet="0123456789.KMGTPkmgBbis/ihd ", max_size=8) | st.from_regex(
    r"\A[0-9]{1,3}(\.[0-9])? ?[KMGTP]?i?(B|b|bit|bytes)?(/s|ps)?[smhd]?\Z"
)


@pytest.mark.parametrize(
    ("place", "parse"),
    [
        (("Limits", "bytes_in_flight"), parse_size),
        (("Limits", "bandwidth"), parse_rate),
        (("Retries", "delay"), parse_duration),
    ],
    ids=["sizes", "rates", "durations"],
)
@given(text=UNITS)
def test_what_a_pattern_takes_is_read(place: tuple[str, str], parse: Any, text: str) -> None:
    try:
        value = parse(text)
    except ValueError as error:
        if "would never end" in str(error):  # zero: only the reader counts
            return
        value = None
    takes = pattern_of(place).fullmatch(text) is not None
    # The reader of durations takes spaces anywhere, even between figures.
    if value is None or " " not in text:
        assert takes == (value is not None), text
