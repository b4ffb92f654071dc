"""Looks at sources and targets: few at each place, and nobody waits for who is silent."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from v2v_async.batch.plan.model import GuestPlan, Limits
from v2v_async.batch.preflight import reach
from v2v_async.batch.preflight.reach import (
    Looks,
    Place,
    local_paths,
    place_of_source,
    place_of_target,
    touch,
)
from v2v_async.errors import SourceError, TargetError
from v2v_async.options import InputOptions, OutputOptions

pytestmark = pytest.mark.anyio


class Watched:
    """Looks that count how many go on at once, at each place and in all."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.done: list[str] = []

    async def look(self, place: Place) -> None:
        for key in (place.key, "all"):
            self.now[key] += 1
            self.most[key] = max(self.most[key], self.now[key])
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        for key in (place.key, "all"):
            self.now[key] -= 1
        self.done.append(place.key)


async def test_at_once() -> None:
    places = [Place(f"h{number}", "x", 4) for number in range(8)]
    watched, looks = Watched(), Looks()
    async with anyio.create_task_group() as group:
        for place in places * 10:
            group.start_soon(looks.at, place, partial(watched.look, place))
    assert len(watched.done) == 80
    assert watched.most["all"] == reach.AT_ONCE
    assert {watched.most[place.key] for place in places} <= {2, 3, 4}


async def test_the_first_one_goes_alone() -> None:
    watched, looks = Watched(), Looks()
    place = Place("h", "x", 4)
    has_begun, may_end = anyio.Event(), anyio.Event()

    async def first() -> None:
        has_begun.set()
        await may_end.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(looks.at, place, first)
        await has_begun.wait()
        for _ in range(6):
            group.start_soon(looks.at, place, lambda: watched.look(place))
        await anyio.wait_all_tasks_blocked()
        assert watched.most["h"] == 0
        may_end.set()
    assert watched.most["h"] == 4


@pytest.mark.parametrize("error", [SourceError, TargetError])
async def test_who_is_silent_is_waited_for_once(error: Any) -> None:
    looks = Looks(0.2)
    dead, alive = Place("dead", "esx1", 4, error), Place("alive", "esx2", 4)
    asked: list[str] = []
    told: list[str] = []
    watched = Watched()

    async def never() -> None:
        asked.append("dead")
        await anyio.sleep_forever()

    async def one(place: Place, look: Callable[[], Any]) -> None:
        try:
            await looks.at(place, look)
        except error as problem:
            told.append(problem.message)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(one, dead, never)
            for _ in range(50):
                group.start_soon(one, alive, lambda: watched.look(alive))
    assert len(asked) == 1
    assert told == ["‘esx1’ does not answer within 0.2 s"] * 100
    assert len(watched.done) == 50


async def test_who_says_no_is_asked_for_every_guest() -> None:
    looks = Looks()
    asked: list[int] = []

    async def refuse(number: int) -> None:
        asked.append(number)
        raise SourceError("no such guest")

    for number in range(3):
        with pytest.raises(SourceError, match="no such guest"):
            await looks.at(Place("h", "x", 2), partial(refuse, number))
    assert asked == [0, 1, 2]


async def test_a_failure_that_took_long_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, place = Looks(), Place("h", "esx1", 2)
    monkeypatch.setattr(reach, "_SLOW_FAILURE_S", 0.01)

    async def give_up() -> None:
        await anyio.sleep(0.05)  # longer than what is called slow above
        raise SourceError("no answer within 30 s")

    with pytest.raises(SourceError, match="no answer within 30 s"):
        await looks.at(place, give_up)
    with pytest.raises(SourceError, match="‘esx1’ has kept another guest waiting"):
        await looks.at(place, give_up)


async def test_what_is_not_bounded_may_take_long() -> None:
    looks = Looks(0.01)

    async def slow() -> str:
        await anyio.sleep(0.1)  # longer than the bound above
        return "done"

    assert await looks.at(Place("h", "x", 1), slow, is_bounded=False) == "done"


async def test_a_file_system_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It holds one thread, not the program."""
    may_end = threading.Event()
    real = os.stat

    def stat(path: Any, *more: Any, **named: Any) -> Any:
        if str(path).startswith("/nfs/"):
            may_end.wait(20)
        return real(path, *more, **named)

    monkeypatch.setattr(os, "stat", stat)
    looks = Looks(0.2)
    place = Place("folder /nfs", "/nfs", 16)
    try:
        with anyio.fail_after(5):
            with pytest.raises(SourceError, match="‘/nfs’ does not answer within"):
                await looks.at(place, lambda: touch(["/nfs/web.img"]))
        await touch([str(tmp_path), str(tmp_path / "gone")])
    finally:
        may_end.set()


def guest(**given: Any) -> GuestPlan:
    return GuestPlan.model_validate({"name": "a", **given})


LIMITS = Limits.model_validate(
    {"hosts": {"esx1": {"connections": 2}}, "targets": {"data": {"connections": 99}}}
)


@pytest.mark.parametrize(
    ("options", "shown", "at_once"),
    [
        (InputOptions("disk", ("nbd://esx1/a",)), "esx1", 2),
        (InputOptions("disk", ("nbd://esx2/a",)), "esx2", 4),
        (InputOptions("disk", ("nbd://esx1:10810/a",)), "esx1:10810", 2),
        (
            InputOptions("disk", ("nbd+unix:///?socket=/run/a",)),
            "nbd+unix:///?socket=/run/a",
            4,
        ),
        (InputOptions("disk", ("/vms/a.img", "nbd://esx1/a")), "/vms", 16),
        (InputOptions("libvirt", ("a",), connection="qemu:///system"), "qemu:///system", 4),
        (InputOptions("libvirt", ("a",)), "libvirt", 4),
        (InputOptions("libvirt", ("a",), connection="vpx://joe@esx1/DC/h"), "esx1", 2),
    ],
)
def test_where_a_source_is_asked_for(options: InputOptions, shown: str, at_once: int) -> None:
    plan = guest(
        input={
            "type": options.mode,
            "source": list(options.arguments),
            "connection": options.connection,
        }
    )
    place = place_of_source(plan, options, LIMITS)
    assert (place.shown, place.at_once) == (shown, at_once)


@pytest.mark.parametrize(
    ("options", "shown", "at_once"),
    [
        (OutputOptions(mode="local", storage="/srv"), "/srv", 16),
        (OutputOptions(mode="rhv", storage="nas:/export"), "nas", 4),
        (OutputOptions(mode="libvirt", storage="data"), "libvirt", 16),
        (OutputOptions(mode="libvirt", connection="qemu+ssh://joe@h/system"), "h", 4),
        (OutputOptions(mode="openstack"), "openstack", 4),
    ],
)
def test_where_a_target_is_asked_for(options: OutputOptions, shown: str, at_once: int) -> None:
    plan = guest(
        output={
            "type": options.mode,
            "storage": options.storage,
            "connection": options.connection,
        }
    )
    place = place_of_target(plan, options, LIMITS)
    assert (place.shown, place.at_once) == (shown, at_once)


def test_what_may_be_a_file_of_this_machine() -> None:
    assert local_paths(InputOptions("disk", ("/a", "nbd://h/a"))) == ("/a",)
    assert local_paths(InputOptions("vmx", ("ssh://h/a.vmx",), transport="ssh")) == ()
    assert local_paths(InputOptions("libvirt", ("web",))) == ()
