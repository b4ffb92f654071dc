"""All that is wrong before the first slow step is told together."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from v2v_async import virt_v2v_in_place
from v2v_async.errors import SourceError, UsageError, V2VError, leaves
from v2v_async.events import Event, Reporter
from v2v_async.input.registry import parse_input
from v2v_async.options import InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.preflight import check_scratch, preflight

pytestmark = pytest.mark.anyio


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "web.img"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    return path


async def look(
    disk: Path, target: Path, events: list[Event], tmpdir: Path | None = None
) -> list[V2VError]:
    """Return what is wrong."""
    source = parse_input(InputOptions("disk", (str(disk),), format="raw"))
    output = parse_output(OutputOptions(mode="local", storage=str(target)))
    try:
        guest = await preflight(source, output, None, tmpdir, Reporter(events.append, "run"))
    except (V2VError, ExceptionGroup) as error:
        return [leaf for leaf in leaves(error) if isinstance(leaf, V2VError)]
    assert guest.name == "web"
    return []


async def test_nothing_is_wrong(disk: Path, tmp_path: Path, events: list[Event]) -> None:
    assert await look(disk, tmp_path, events) == []


async def test_one_thing_is_wrong(disk: Path, tmp_path: Path, events: list[Event]) -> None:
    (problem,) = await look(disk, tmp_path / "no", events)
    assert isinstance(problem, UsageError)
    assert problem.step == "output"


async def test_three_things_are_wrong(tmp_path: Path, events: list[Event]) -> None:
    problems = await look(tmp_path / "no.img", tmp_path / "no", events, tmp_path / "gone")
    assert [(type(p), p.step) for p in problems] == [
        (SourceError, "input"),
        (UsageError, "input"),
        (UsageError, "output"),
    ]
    assert "no.img" in problems[0].message
    assert "temporary directory" in problems[1].message


async def test_a_mistake_of_ours_is_not_taken_for_a_problem(
    disk: Path, tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(virt_v2v_in_place, "probe", broken)
    with pytest.raises(ZeroDivisionError):
        await look(disk, tmp_path, events)


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 1 << 20))
    with pytest.raises(UsageError, match=r"1\.0 MiB left; the conversion needs 1\.0 GiB") as caught:
        check_scratch(tmp_path)
    assert "TMPDIR" in str(caught.value.hint)
