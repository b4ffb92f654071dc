"""--serve over real connections: the state of the batch and its metrics."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.web_batch import GIB, ServedBatch, made, samples, served
from tests.web_batch import batch as batch
from v2v_async.web.state_json import BatchDocument


def everything(batch: ServedBatch) -> None:
    """Have a batch in which all that a state can tell is told."""
    a, b, c, d = batch.plan(["a", "b/c d?", "c", "d"], disks=(GIB, 2 * GIB))
    limits = {"taken": {"conversions": 1}, "capacities": {"conversions": 2, "memory": 8 * GIB}}
    batch.emit("limits", details=limits)
    batch.emit("warning", text="it is slow")
    batch.emit("started", a, details={"attempt": 1})
    batch.emit("started", a, step="convert")
    batch.emit("finished", a, step="convert")
    batch.emit("converted", a)
    batch.emit("started", a, step="copy")
    batch.copy(a, 100 << 20)
    batch.copy(a, 300 << 20)
    batch.emit("waiting", a, disk=2, details={"for": "disks", "until": None})
    batch.emit("started", b, details={"attempt": 1})
    batch.emit("retrying", b, text="refused", details={"attempt": 2, "at": time.time() + 60})
    batch.emit("paused", b)
    details = {"step": "copy", "disk": 2, "permanent": True, "bundle": "/b.tar.gz"}
    batch.emit("started", c, details={"attempt": 3})
    batch.emit("failed", c, text="full", hint="more space", offset=4096, log="/l", details=details)
    batch.emit("started", d, details={"attempt": 1})
    batch.emit("finished", d, duration_s=1.0)


def test_the_state_is_as_its_schema_says(batch: ServedBatch) -> None:
    everything(batch)
    told = batch.get("/api/state").text
    state = BatchDocument.model_validate_json(told, strict=True, extra="forbid")
    guests = {guest.name: guest for guest in state.guests}
    assert (state.name, state.run, state.outcome) == ("move-it", "run-1", None)
    assert (state.limits["conversions"].taken, state.limits["conversions"].capacity) == (1, 2)
    assert guests["a"].phase == "copying"
    assert guests["a"].disks[0].moved == 300 << 20
    assert guests["a"].disks[0].total == 2 * GIB
    assert guests["a"].disks[1].waits_for == "disks"
    assert guests["b/c d?"].paused
    assert guests["c"].failure is not None
    assert guests["c"].failure.hint == "more space"
    assert guests["d"].phase == "done"
    assert state.bytes.moved >= 300 << 20


def test_the_schema_needs_and_knows_every_key(batch: ServedBatch) -> None:
    """Each key that is told is in the published schema, and the other way round."""
    everything(batch)
    told = batch.get("/api/state").json()
    schema = json.loads((ROOT / "docs" / "schema" / "batch-state.json").read_text())
    seen: set[str] = set()

    def check(value: Any, part: dict[str, Any]) -> None:
        if "$ref" in part:
            name = part["$ref"].rpartition("/")[2]
            seen.add(name)
            part = schema["$defs"][name]
        for option in part.get("anyOf", ()):
            if "$ref" in option and value is not None:
                check(value, option)
        if "properties" in part:
            assert set(value) == set(part["properties"]) == set(part["required"])
            for key, each in part["properties"].items():
                check(value[key], each)
        if isinstance(part.get("additionalProperties"), dict):
            for each in value.values():
                check(each, part["additionalProperties"])
        if "items" in part:
            for each in value:
                check(each, part["items"])

    check(told, schema)
    assert seen == set(schema["$defs"])


@pytest.mark.parametrize("state", ["nothing", "planned", "over"])
def test_the_state_at_the_ends(state: str) -> None:
    with served() as batch:
        if state != "nothing":
            batch.plan(2)
        if state == "over":
            batch.emit("finished", details={"done": 2, "failed": 0, "cancelled": 0})
        told = BatchDocument.model_validate_json(batch.get("/api/state").text, extra="forbid")
    assert told.outcome == ("finished" if state == "over" else None)
    assert len(told.guests) == (0 if state == "nothing" else 2)


def test_one_guest(batch: ServedBatch) -> None:
    everything(batch)
    told = batch.get("/api/guests/b/c%20d%3F").json()
    assert told["guest"]["name"] == "b/c d?"
    assert (told["version"], told["run"]) == (1, "run-1")
    for name in ("nobody", "b", "b%2Fc", "", "%00"):
        missing = batch.get(f"/api/guests/{name}")
        assert (missing.status, "there is no guest" in missing.json()["error"]) == (404, True)


def test_a_name_that_nothing_can_decode() -> None:
    with served() as batch:
        batch.plan(["\udcff"])
        batch.emit("started", "\udcff", details={"attempt": 1})
        batch.copy("\udcff", GIB)
        assert "\udcff" in [g["name"] for g in batch.get("/api/state").json()["guests"]]
        assert 'guest="?"' in batch.get("/metrics").text


def test_500_guests_are_told_quickly_and_small() -> None:
    with served() as batch:
        names = batch.plan(500, disks=(40 * GIB, 8 * GIB))
        batch.send(*(made("started", name, details={"attempt": 1}) for name in names))
        began = time.monotonic()
        answer = batch.get("/api/state", headers={"Accept-Encoding": "gzip"})
        took_s = time.monotonic() - began
        assert len(answer.json()["guests"]) == 500
        assert int(answer.headers["content-length"]) < 30_000
        assert took_s < 2
        assert len(answer.text) > 100_000


# Metrics.


def test_metrics(batch: ServedBatch) -> None:
    everything(batch)
    answer = batch.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    state = batch.get("/api/state").json()
    assert found["v2v_run_info", "move-it", "run-1", "0.1.0"] == 1
    assert found["v2v_guests", "copying"] == 1
    assert found["v2v_guests", "failed"] == 1
    assert found["v2v_guests", "converting"] == 0
    assert sum(v for key, v in found.items() if key[0] == "v2v_guests") == 7  # 3 before, 4 now
    assert found["v2v_guests_paused",] == 1
    assert found["v2v_guests_waiting", "time"] == 1
    assert found["v2v_guest_failures_total",] == 1
    assert found["v2v_guest_retries_total",] == 1
    assert found["v2v_limit_taken", "conversions"] == 1
    assert found["v2v_limit_capacity", "memory"] == 8 * GIB
    assert found["v2v_moved_bytes",] == state["bytes"]["moved"]
    assert found["v2v_to_move_bytes",] == state["bytes"]["to_move"]
    assert found["v2v_copied_bytes_total",] == 300 << 20
    assert found["v2v_disk_moved_bytes", "1", "a"] == 300 << 20
    assert found["v2v_disk_to_move_bytes", "1", "a"] == GIB
    assert found["v2v_rate_bytes_per_second",] > 0
    assert found["v2v_run_start_time_seconds",] == pytest.approx(time.time(), abs=60)
    # Of guests that are not at work there is nothing for each disk.
    assert {key[2] for key in found if key[0].startswith("v2v_disk_")} == {"a"}
    before = found["v2v_events_total",]
    batch.emit("warning", text="again")
    assert samples(batch.get("/metrics").text)["v2v_events_total",] == before + 1


def test_metrics_in_the_newer_format(batch: ServedBatch) -> None:
    everything(batch)
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = batch.get("/metrics", headers=accept)
    content_type = answer.headers["content-type"]
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert samples(answer.text, content_type)["v2v_guest_failures_total",] == 1
