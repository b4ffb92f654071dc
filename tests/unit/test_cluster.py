"""What a cluster needs and that needs no cluster: addresses, seals, errors, places, the outbox."""

from __future__ import annotations

import errno
import pickle
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.cluster_work import made_order
from v2v_async import __version__
from v2v_async.batch.cluster.address import ClusterAddress, parse_cluster
from v2v_async.batch.cluster.cluster import Cluster
from v2v_async.batch.cluster.connecting import ClusterPool
from v2v_async.batch.cluster.errors_sent import error_sent, error_to_send
from v2v_async.batch.cluster.outbox import Outbox
from v2v_async.batch.cluster.placement import Load, choose, shares
from v2v_async.batch.cluster.sealed import Sealed, has_secrets
from v2v_async.batch.cluster.session import Session
from v2v_async.batch.cluster.workers import Introduction, Worker, check_introductions, introducing
from v2v_async.batch.retry import is_permanent
from v2v_async.errors import (
    ConversionError,
    CopyError,
    DependencyError,
    NotKeptError,
    RequestError,
    ServerExitedError,
    UsageError,
    V2VError,
)
from v2v_async.events import Bytes, Event, Reporter

# Addresses.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local:1", ClusterAddress(workers=1)),
        ("local:12", ClusterAddress(workers=12)),
        ("tcp://dask.example:8786", ClusterAddress(uri="tcp://dask.example:8786")),
        ("tls://[fe80::1]:8786", ClusterAddress(uri="tls://[fe80::1]:8786")),
    ],
)
def test_addresses(text: str, expected: ClusterAddress) -> None:
    assert parse_cluster(text) == expected
    assert str(parse_cluster(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "local",
        "local:",
        "local:0",
        "local:257",
        "local:two",
        "tcp://dask.example",
        "tcp://:8786",
        "tcp://dask.example:port",
        "tcp://dask.example:99999",
        "tcp://me:secret@dask.example:8786",
        "tcp://dask.example:8786/x",
        "http://dask.example:8786",
        "dask.example:8786",
        "tcp://[fe80::1:8786",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_cluster(text)
    assert "--cluster" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("local:2", True),
        ("tls://dask.example:1", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://dask.example:1", False),
        ("tcp://192.168.0.7:1", False),
    ],
)
def test_who_can_listen(text: str, is_private: bool) -> None:
    assert parse_cluster(text).is_private is is_private


# Seals.


def test_a_seal_keeps_the_password_and_shows_nothing() -> None:
    order = made_order(Path("/x"), "g", password="hunter2-and-more")
    sealed = pickle.loads(pickle.dumps(Sealed.of(("begin", {"order": order}))))
    opened = sealed.open()[1]["order"]
    password = opened.options.input.password
    assert password is not None
    assert password.reveal() == "hunter2-and-more"
    assert replace(opened, options=order.options) == order
    assert "hunter2" not in f"{sealed} {sealed!r} {[sealed]} {opened}"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(order)  # unsealed, a password goes nowhere


@pytest.mark.parametrize(
    ("place", "change", "expected"),
    [
        ("input", {}, False),
        ("input", {"connection": "vpx://root@vc/dc/esx"}, False),
        ("input", {"connection": "vpx://root:secret@vc/dc/esx"}, True),
        ("output", {"options": (("password", "x"),)}, True),
        ("output", {"options": (("storage", "x"),)}, False),
        ("convert", {"keys": ("/dev/sda1:key:secret",)}, True),
        ("convert", {"keys": ("/dev/sda1:file:/k",)}, False),
    ],
)
def test_options_with_secrets(place: str, change: dict[str, Any], expected: bool) -> None:
    options = made_order(Path("/x"), "g").options
    changed = replace(options, **{place: replace(getattr(options, place), **change)})
    assert has_secrets(changed) is expected


def test_a_password_is_a_secret() -> None:
    assert has_secrets(made_order(Path("/x"), "g", password="p").options)


# Errors.


def _caused(error: V2VError, cause: BaseException) -> V2VError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        V2VError("m", hint="h", guest="g", step="copy", disk=2, offset=4096, log=Path("/l/x.log")),
        UsageError("wrong"),
        DependencyError("missing", hint="apt-get install it"),
        ConversionError("no", phase="inspecting"),
        NotKeptError("what was converted is not there any more"),
        ServerExitedError("gone", status=-9, stderr_tail="last words"),
        RequestError("read", offset=0, length=512, reason="no room", errno=errno.ENOSPC),
        _caused(CopyError("copy failed", disk=1), OSError(errno.ENOSPC, "full")),
        _caused(CopyError("copy failed", disk=1), OSError(errno.EIO, "broken")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_they_were(error: V2VError) -> None:
    arrived = error_sent(error_to_send(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert (arrived.hint, arrived.log, arrived.offset) == (error.hint, error.log, error.offset)
    assert is_permanent(arrived) is is_permanent(error)
    for name in ("status", "stderr_tail", "phase", "op", "length"):
        assert getattr(arrived, name, None) == getattr(error, name, None)


def test_an_error_of_a_class_that_is_not_known_here() -> None:
    told = error_to_send(V2VError("m", hint="h"))
    for kind in ("FutureError", "annotations", "Path"):
        arrived = error_sent({**told, "kind": kind})
        assert type(arrived) is V2VError
        assert (arrived.message, arrived.hint) == ("m", "h")


# Places.


def load(name: str, conversions: int = 2, copies: int = 4) -> Load:
    return Load(name, {"conversions": conversions, "copies": copies})


@pytest.mark.parametrize(
    ("loads", "resource", "expected"),
    [
        ([], "conversions", None),
        ([load("a"), load("b")], "conversions", "a"),
        ([load("a", conversions=1), load("b", conversions=0)], "conversions", "a"),
        ([load("a"), load("c")], None, "a"),
        ([load("c")], None, None),
        ([load("a", copies=0), load("b")], "conversions", "b"),
    ],
)
def test_places(loads: list[Load], resource: str | None, expected: str | None) -> None:
    assert choose(loads, resource, {"a", "b"}) == expected


def test_guests_go_where_there_is_room() -> None:
    a, b = load("a"), load("b")
    a.taken["conversions"] = 1
    assert choose([a, b], "conversions", {"a", "b"}) == "b"
    assert choose([a, b], "conversions", {"a"}) == "a"
    b.taken["conversions"] = 1
    b.taken["copies"] = 1
    assert choose([a, b], "conversions", {"a", "b"}) == "a"
    a.taken["conversions"] = b.taken["conversions"] = 2
    assert choose([a, b], "conversions", {"a", "b"}) is None
    assert choose([a, b], None, {"a", "b"}) == "a"
    a.guests = 3
    b.taken["copies"] = 0
    assert choose([a, b], None, {"a", "b"}) == "b"


def test_rates_are_divided_by_copies() -> None:
    copies = {"a": Counter({"": 3, "slow": 1}), "b": Counter({"": 1}), "c": Counter[str]()}
    divided = shares({"": 500, "slow": 90}, copies)
    assert divided == {
        "a": {"": 300, "slow": 30},
        "b": {"": 100, "slow": 30},
        "c": {"": 100, "slow": 30},
    }
    assert shares({}, copies) == {"a": {}, "b": {}, "c": {}}
    assert shares({"": 10}, {}) == {}


# Who takes part.


def told(**changes: Any) -> dict[str, Any]:
    return {
        "version": __version__,
        "name": "w",
        "host": "h",
        "machine": "m",
        "memory": 1,
        "tmpdir": "/var/tmp",
        "resources": {"conversions": 1, "copies": 2},
        "problem": "",
        **changes,
    }


def test_introductions() -> None:
    class FakeWorker:
        name = 7

        class state:
            total_resources = {"conversions": 1.0, "copies": 2.0}

    said = introducing()(FakeWorker)
    known = check_introductions({"tcp://a:1": said, "tcp://b:1": OSError("gone")}, "tcp://s:1")
    assert list(known) == ["tcp://a:1"]
    assert known["tcp://a:1"].version == __version__
    assert known["tcp://a:1"].resources == {"conversions": 1, "copies": 2}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"version": "0.0.1"}, "tcp://a:1 on h has 0.0.1"),
        ({"version": None, "problem": "No module named 'v2v_async'"}, "No module named"),
    ],
)
def test_another_version(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(DependencyError) as caught:
        check_introductions({"tcp://a:1": told(**wrong), "tcp://b:1": told()}, "tcp://s:1")
    assert words in caught.value.message
    assert "tcp://b:1" not in caught.value.message
    assert caught.value.hint
    assert is_permanent(caught.value)


def test_what_a_worker_has_of_its_own() -> None:
    introduction = Introduction(__version__, "w", "h", "m", 1, Path("/var/tmp"), {})
    worker = Worker(introduction, load("tcp://a:1"))
    own = worker.own_path(Path("/runs/r/g"), "run")
    assert own == worker.own_path(Path("/runs/r/g"), "run")
    assert own != worker.own_path(Path("/runs/r/g"), "another")
    assert re.fullmatch(r"/var/tmp/v2v\.[0-9a-f]{16}", str(own))


# The outbox.


def outbox_and_lines() -> tuple[Outbox, list[list[str]]]:
    batches: list[list[str]] = []
    return Outbox("r", batches.append), batches


def kinds(lines: list[str]) -> list[Any]:
    events = [Event.from_json(line) if "answer" not in line else None for line in lines]
    return [(e.type, e.disk, e.bytes and e.bytes.copied) if e else "answer" for e in events]


def test_only_the_latest_progress_and_in_order() -> None:
    outbox, batches = outbox_and_lines()
    reporter = Reporter(outbox.event, "r", clock=lambda: 1.0).for_guest("g").for_step("copy")
    reporter.emit("started")
    for copied in range(1000):
        for disk in (1, 2):
            reporter.for_disk(disk).emit("progress", bytes=Bytes(copied=copied))
    reporter.for_disk(1).emit("finished", bytes=Bytes(copied=1000))
    outbox.tell(answer="done", of="x", result=None)
    outbox.flush(1.0)
    outbox.flush(1.0)  # nothing is left
    assert [kinds(lines) for lines in batches] == [
        [
            ("started", None, None),
            ("progress", 1, 999),
            ("progress", 2, 999),
            ("finished", 1, 1000),
            "answer",
        ]
    ]


def test_a_flood_is_bounded_and_what_matters_is_kept() -> None:
    outbox, batches = outbox_and_lines()
    reporter = Reporter(outbox.event, "r", clock=lambda: 1.0)
    for number in range(5000):
        reporter.debug(f"{number}")
    reporter.emit("failed", "no room")
    outbox.tell(answer="ended", of="x", error=None)
    outbox.flush(1.0)
    lines = batches[0]
    assert len(lines) == 2000 + 3
    assert Event.from_json(lines[1999]).text == "1999"
    assert Event.from_json(lines[2000]).type == "failed"
    assert Event.from_json(lines[-1]).text == (
        "3000 messages are left out: they came faster than they can be sent"
    )
    reporter.debug("after")
    outbox.flush(1.0)
    assert [Event.from_json(line).text for line in batches[1]] == ["after"]


@pytest.mark.anyio
async def test_at_most_ten_times_a_second() -> None:
    outbox, batches = outbox_and_lines()
    reporter = Reporter(outbox.event, "r")

    async def say(until: Callable[[], bool]) -> None:
        while not until():
            reporter.debug("x")
            await anyio.sleep(0.001)  # a flood, but not without an end to each wave

    async with anyio.create_task_group() as group:
        group.start_soon(outbox.keep_sending, lambda: 1.0)
        began = anyio.current_time()
        with anyio.fail_after(10):
            await say(lambda: len(batches) >= 4)
        assert anyio.current_time() - began >= 0.29  # the first at once, three more behind it
        # Answers don't wait.
        began = anyio.current_time()
        for number in range(4, 14):
            outbox.tell(answer="done", of=str(number))
            while len(batches) <= number:
                await anyio.lowlevel.checkpoint()
        assert anyio.current_time() - began < 0.9
        group.cancel_scope.cancel()
    assert all(len(lines) > 1 for lines in batches[1:4])


# What workers say, as the supervisor hears it.


class NoClient:
    """dask's client, where nothing is asked of it."""

    status = "running"


def a_cluster(uri: str = "tcp://dask.example:1") -> tuple[Cluster, list[Event]]:
    events: list[Event] = []

    @asynccontextmanager
    async def nothing(reporter: Reporter) -> AsyncIterator[Any]:
        yield None

    client: Any = NoClient()
    return Cluster(client, parse_cluster(uri), Reporter(events.append, "r"), nothing, 30.0), events


def said(number: int, *lines: str, session: str = "s") -> tuple[float, dict[str, Any]]:
    return 0.0, {"session": session, "number": number, "lines": list(lines)}


def entered(cluster: Cluster, session: str = "s") -> Worker:
    """Have a worker of a cluster that was taken in."""
    introduction = Introduction(__version__, "w", "h", "m", 1, Path("/var/tmp"), {})
    worker = Worker(introduction, load("tcp://a:1"), session=session)
    cluster._sessions[session] = cluster._workers["tcp://a:1"] = worker
    return worker


@pytest.mark.anyio
async def test_events_and_answers_are_told_apart() -> None:
    cluster, events = a_cluster()
    answers: list[dict[str, Any]] = []
    event = Event(time=1.0, run="r", type="message", text='not an {"answer": 1}')
    line = '{"answer": "done", "of": "c1", "result": 7}'
    with cluster.listening("done c1", answers.append):
        cluster.hear(said(1, event.to_json(), line, line.replace("c1", "c2")))
    cluster.hear(said(2, line))  # nobody waits any more
    assert events == [event]
    assert answers == [{"answer": "done", "of": "c1", "result": 7}]


@pytest.mark.anyio
async def test_a_worker_that_is_not_heard_in_whole_is_lost() -> None:
    cluster, events = a_cluster()
    worker = entered(cluster)
    event = Event(time=1.0, run="r", type="message", text="x").to_json()
    cluster.hear(said(1, event))
    assert not worker.lost.is_set()
    cluster.hear(said(3, event))
    assert worker.lost.is_set()
    assert cluster.workers == []
    assert [each.type for each in events] == ["message", "warning", "message"]
    assert "did not arrive" in (events[1].text or "")
    assert cluster._awaited == {"tcp://a:1"}, "it is there, and is taken in again"


@pytest.mark.anyio
async def test_what_an_earlier_session_says_late_is_not_counted() -> None:
    cluster, events = a_cluster()
    worker = entered(cluster, "new")
    event = Event(time=1.0, run="r", type="message", text="x").to_json()
    cluster.hear(said(17, event, session="old"))
    cluster.hear(said(1, event, session="new"))
    cluster.hear(said(18, event, session="old"))
    cluster.hear(said(2, event, session="new"))
    assert not worker.lost.is_set()
    assert [each.type for each in events] == ["message"] * 4


@pytest.mark.anyio
async def test_a_worker_that_the_scheduler_has_lost_is_not_awaited() -> None:
    cluster, events = a_cluster()
    worker = entered(cluster)
    cluster.hear_of_workers((0.0, {"action": "remove-worker", "worker": "tcp://a:1"}))
    assert worker.lost.is_set()
    assert cluster._awaited == set()
    cluster.hear_of_workers((0.0, {"action": "add-worker", "worker": "tcp://a:1"}))
    assert cluster._awaited == {"tcp://a:1"}
    assert [each.text for each in events] == ["the worker ‘w’ on h is gone"]


# Leases.


@pytest.mark.anyio
async def test_a_late_renewal_revives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(Session, "clock", staticmethod(lambda: now))
    session = Session("r", 30.0, lambda lines: None)
    now = 110.0
    assert session.renew(100.0) == 110.0
    # Sent at 110 and under way until now: who sent it counts from the answer of 110.
    now = 129.0
    assert session.renew(100.0) == 129.0
    now = 130.5
    assert session.renew(110.0) is None, "the lease of 100 has ended"
    assert session.renew(130.0) is None, "and stays so"


@pytest.mark.anyio
async def test_a_renewal_that_is_overtaken_shortens_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(Session, "clock", staticmethod(lambda: now))
    session = Session("r", 30.0, lambda lines: None)
    now = 120.0
    assert session.renew(115.0) == 120.0
    assert session.renew(100.0) == 120.0
    now = 144.0
    assert session.renew(120.0) == 144.0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("uri", "password", "count"),
    [
        ("tcp://dask.example:1", "p", 1),
        ("tcp://dask.example:1", None, 0),
        ("tls://dask.example:1", "p", 0),
        ("tcp://127.0.0.1:1", "p", 0),
    ],
)
async def test_a_password_that_others_could_read(
    uri: str, password: str | None, count: int
) -> None:
    cluster, events = a_cluster(uri)
    pool = ClusterPool(cluster)
    for name in ("a", "b"):
        pool.work(made_order(Path("/x"), name, password=password), cluster.reporter)
    assert [each.type for each in events] == ["warning"] * count
    assert all("tls://" in (each.text or "") for each in events)
