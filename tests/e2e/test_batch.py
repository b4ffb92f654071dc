"""A batch with real conversions, whose supervisor is killed when one is converted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.batches import Batch

pytestmark = pytest.mark.appliance


def test_a_conversion_that_finished_is_not_repeated(
    short_tmp: Path, phony_guest: Path, no_os_disk: Path
) -> None:
    batch = Batch(short_tmp, 3, disks=1)
    for name, disk in (("g1", phony_guest / "system.img"), ("g2", no_os_disk), ("g3", None)):
        shutil.copyfile(disk or phony_guest / "system.img", batch.disks[name][0])
    batch.remember_sources()
    replay, _, real = batch.environment["PATH"].partition(":")
    assert "replay" in replay
    batch.environment["PATH"] = real
    # So slow that what is converted first is still being copied when the supervisor is killed.
    batch.write_plan('[limits]\nconversions = 2\nbandwidth = "100KiB/s"\n')
    run = batch.begin("run", str(batch.plan), "--name", "r")
    converted = batch.await_event(run, lambda event: event.type == "converted").guest
    batch.await_event(run, lambda event: event.type == "progress" and event.guest == converted)
    batch.kill(run)
    plan = batch.run() / "plan.json"
    plan.write_text(plan.read_text().replace('"bandwidth": 102400', '"bandwidth": null'))
    batch.batch("resume", "r", status=11)
    events = batch.events()
    begun = [event.guest for event in events if event.step == "convert" and event.type == "started"]
    assert begun.count(converted) == 1
    assert batch.phases() == {"g1": "done", "g2": "failed", "g3": "done"}
    # It may have failed before the kill; whoever goes on says it again.
    failed = [event for event in events if event.type == "failed" and event.step is None][-1]
    assert failed.guest == "g2"
    assert failed.details is not None
    assert failed.details["permanent"] is True
    for name in ("g1", "g3"):
        made = (batch.out / f"{name}-sda").read_bytes()
        assert made != batch.disks[name][0].read_bytes()
        assert b"update-initramfs" in made, "what the conversion called is noted in the guest"
    batch.assert_nothing_left("g1", "g3")
