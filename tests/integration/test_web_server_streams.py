"""--serve over real connections: streams, and that nobody who reads them holds up the run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.waiting import wait_until
from tests.web_batch import GIB, Messages, ServedBatch, made, samples, served
from tests.web_batch import batch as batch
from v2v_async.events import Bytes, Event
from v2v_async.web import listening
from v2v_async.web.state_json import BatchDocument


def streams(batch: ServedBatch) -> float:
    """Return how many streams the server says it has."""
    return samples(batch.get("/metrics").text)["v2v_streams",]


@pytest.fixture
def messages(batch: ServedBatch) -> Iterator[Messages]:
    with batch.stream("/api/events") as connection:
        reader = Messages(connection)
        yield reader
        reader.close()


def test_events(batch: ServedBatch, messages: Messages) -> None:
    assert messages.status == 200
    # Whoever loads the state now, and takes in what follows, has missed nothing.
    assert messages.next() == ("reload", {"lost": False})
    sent = [
        made("started", "g001", details={"attempt": 1}),
        made("warning", "g001", text="a\nb\rc \u2028 d", hint="‘x’"),
        made("progress", "g001", step="copy", disk=1, bytes=Bytes(total=9, data=9, copied=3)),
    ]
    for event in sent:
        batch.send(event)
    for event in sent:
        kind, told = messages.next() or ("", None)
        assert kind == "message"
        assert Event.from_json(json.dumps(told)) == event


def test_changes(batch: ServedBatch) -> None:
    with batch.stream("/api/changes") as connection:
        messages = Messages(connection)
        kind, whole = messages.next() or ("", {})
        assert (kind, len(whole["guests"])) == ("state", 3)
        batch.emit("started", "g002", details={"attempt": 1})
        told = messages.until(lambda _, state: bool(state["guests"]))
        BatchDocument.model_validate(told, extra="forbid")
        assert [guest["name"] for guest in told["guests"]] == ["g002"]
        assert told["counts"] == {"waiting": 2, "checking": 1}
        batch.emit("finished", details={})
        assert messages.until(lambda _, state: state["outcome"])["guests"] is not None
        messages.close()


def test_progress_that_is_not_read_is_one_event(batch: ServedBatch, messages: Messages) -> None:
    messages.next()
    many = [
        made("progress", "g001", step="copy", disk=1, bytes=Bytes(total=GIB, copied=copied))
        for copied in range(50_000)
    ]
    batch.send(*many, made("warning", text="the last"))
    assert messages.next() == ("message", json.loads(many[-1].to_json()))
    assert (messages.next() or ("", {}))[1]["text"] == "the last"


def test_who_does_not_read_holds_up_nobody(batch: ServedBatch) -> None:
    with batch.stream("/api/events", buffer=4096) as slow, batch.stream("/api/events") as quick:
        reader = Messages(quick)
        assert (reader.next() or ("",))[0] == "reload"
        began = time.monotonic()
        for number in range(200):  # 20 MB: more than the kernel takes for a socket
            batch.send(*(made("warning", text="x" * 5000, offset=number) for _ in range(20)))
            assert reader.until(lambda kind, told: kind == "message")["offset"] <= number
        batch.emit("warning", text="the end")
        reader.until(lambda kind, told: told.get("text") == "the end")
        assert batch.get("/api/state").status == 200
        assert time.monotonic() - began < 30
        late = Messages(slow)
        # It is told what it has lost, and then what came afterwards.
        late.until(lambda kind, told: kind == "reload" and told["lost"])
        late.until(lambda kind, told: told.get("text") == "the end")
        late.close()
        reader.close()


def test_who_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "UNREAD_MS", 500)
    with served() as batch, batch.stream("/api/events", buffer=4096):
        wait_until(lambda: streams(batch) == 1, "it has a stream")
        batch.send(*(made("warning", text="x" * 100_000) for _ in range(100)))
        wait_until(lambda: streams(batch) == 0, "its stream is taken from it")


def test_who_goes_away_is_forgotten(batch: ServedBatch) -> None:
    for path in ("/api/events", "/api/changes"):
        with batch.stream(path) as connection:
            messages = Messages(connection)
            messages.next()
            messages.close()
    wait_until(lambda: streams(batch) == 0, "both streams are given back", within_s=10)


def test_too_many_streams(batch: ServedBatch) -> None:
    with ExitStack() as stack:
        readers = [Messages(stack.enter_context(batch.stream("/api/changes"))) for _ in range(33)]
        assert [reader.status for reader in readers] == [200] * 32 + [503]
        assert batch.get("/api/state").status == 200
        for reader in readers:
            reader.close()
