"""-o qemu, json and kubevirt: every step cancelled or failing, by the whole run and by the helpers.

The conversion is replayed, as in test_guest_faults.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anyio
import pytest
import yaml

from tests.fault.test_guest_faults import STEPS, Place, place, quiet, run_helpers, when
from tests.integration.servers import MIB, digest
from tests.kubevirt_api import check
from v2v_async.errors import V2VError
from v2v_async.events import Event
from v2v_async.guest import convert_guest

__all__ = ["place"]  # a fixture

pytestmark = pytest.mark.anyio
SUFFIXES = {"qemu": ".sh", "json": ".json", "kubevirt": ".yaml"}
MODES = list(SUFFIXES)


def outputs(mode: str) -> tuple[str, ...]:
    return ("web-sda", "web-sdb", f"web{SUFFIXES[mode]}")


@pytest.mark.parametrize("mode", MODES)
async def test_a_whole_run_is_that_of_local(place: Place, mode: str) -> None:
    """The disks are the same; the document says what the conversion found."""
    await convert_guest(place.options(name="plain"), quiet(), tmpdir=place.tmp)
    await convert_guest(place.options(mode=mode), quiet(), tmpdir=place.tmp)
    for disk in ("sda", "sdb"):
        assert digest(place.out / f"web-{disk}") == digest(place.out / f"plain-{disk}")
        plain = (place.out / f"plain-{disk}").stat().st_blocks
        assert abs((place.out / f"web-{disk}").stat().st_blocks - plain) * 512 <= 65536
    text = (place.out / f"web{SUFFIXES[mode]}").read_text()
    if mode == "json":
        document = json.loads(text)
        assert document["inspect"]["osinfo"] == "debian12"
        assert document["guestcaps"]["virtio-rng"] is True
        assert [disk["size"] for disk in document["disks"]] == [24 * MIB, 8 * MIB]
    elif mode == "kubevirt":
        machine = check(yaml.safe_load(text))
        assert machine.metadata.labels["libguestfs.org/osinfo"] == "debian12"
        assert len(machine.spec.template.spec.domain.devices.disks) == 2
    else:
        assert text.startswith("#!/bin/sh\n")
        assert f"file={place.out}/web-sdb" in text
    plain_names = ("plain-sda", "plain-sdb", "plain.xml")
    place.assert_nothing_left(outputs=(*outputs(mode), *plain_names))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES)
async def test_cancelled_in_each_step(place: Place, mode: str, step: str) -> None:
    """An earlier guest's files are replaced by a whole one or not at all."""
    older = (f"web{SUFFIXES[mode]}", "web-sda")
    for name in older:
        (place.out / name).write_bytes(b"an older conversion")
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(place.options(mode=mode), reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    if step == "cleanup" and not scope.cancelled_caught:
        place.assert_nothing_left(outputs=outputs(mode))
        return
    place.assert_nothing_left(outputs=older)
    assert {(place.out / name).read_bytes() for name in older} == {b"an older conversion"}


@pytest.mark.parametrize("step", STEPS)
async def test_folders_of_a_pattern_go_with_a_cancelled_run(place: Place, step: str) -> None:
    options = place.options(mode="json", options=(("json-disks-pattern", "a/b/%{DiskNo}"),))
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(options, reporter, tmpdir=place.tmp)
    if step == "cleanup" and not scope.cancelled_caught:
        place.assert_nothing_left(outputs=("a", "web.json"))
        return
    place.assert_nothing_left()


@pytest.mark.parametrize("mode", MODES)
async def test_a_full_file_system(place: Place, mode: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.out)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        with pytest.raises(V2VError, match="No space left"):
            await convert_guest(place.options(mode=mode), quiet(), tmpdir=place.tmp)
        place.assert_nothing_left()
    finally:
        subprocess.run(["umount", str(place.out)], check=True)


@pytest.mark.parametrize("mode", MODES)
async def test_a_document_that_can_not_be_replaced(
    place: Place, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of the renames fails: the disks before it go back too."""
    (place.out / "web-sda").write_bytes(b"an older conversion")
    rename = os.rename

    def fail(source: str, target: str) -> None:
        if str(target).endswith(SUFFIXES[mode]):
            raise PermissionError(1, os.strerror(1))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(V2VError, match="can't rename"):
        await convert_guest(place.options(mode=mode), quiet(), tmpdir=place.tmp)
    place.assert_nothing_left(outputs=("web-sda",))
    assert (place.out / "web-sda").read_bytes() == b"an older conversion"


@pytest.mark.parametrize("mode", MODES)
def test_setup_and_final_by_the_helpers(place: Place, mode: str) -> None:
    """Two processes, with only the v2v directory between them."""

    def names_are_given_at_the_end(words: list[str]) -> None:
        there = [path.name for path in place.out.iterdir() if not path.name.startswith(".")]
        assert sorted(there) == (sorted(outputs(mode)) if words == ["final"] else [])

    run_helpers(place, mode, "-os", str(place.out), then=names_are_given_at_the_end)
    place.assert_nothing_left(outputs=outputs(mode))


# -o kubevirt -oo create=false


def existing(place: Place, folder: Path) -> tuple[list[Path], tuple[tuple[str, str], ...]]:
    disks = [folder / "pvc1", folder / "pvc2"]
    for disk in disks:
        disk.write_bytes(b"\xaa" * 32 * MIB)
    return disks, (*(("disk", str(disk)) for disk in disks), ("create", "false"))


async def test_disks_that_were_there_hold_the_guest(place: Place, short_tmp: Path) -> None:
    """All of it: where the source is zero, what they held is gone."""
    await convert_guest(place.options(name="plain"), quiet(), tmpdir=place.tmp)
    disks, options = existing(place, short_tmp)
    await convert_guest(place.options(mode="kubevirt", options=options), quiet(), tmpdir=place.tmp)
    for disk, plain in zip(disks, ("plain-sda", "plain-sdb"), strict=True):
        expected = (place.out / plain).read_bytes()
        assert disk.read_bytes()[: len(expected)] == expected
        assert disk.stat().st_size == 32 * MIB
    place.assert_nothing_left(outputs=("plain-sda", "plain-sdb", "plain.xml", "web.yaml"))


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_it_says_what_may_hold_part_of_a_guest(
    place: Place, short_tmp: Path, step: str
) -> None:
    disks, options = existing(place, short_tmp)
    seen: list[Event] = []
    with anyio.CancelScope() as scope:
        reporter, events = when(step, scope.cancel)
        seen = events
        await convert_guest(
            place.options(mode="kubevirt", options=options), reporter, tmpdir=place.tmp
        )
    named = [event.text or "" for event in seen if event.type == "warning"]
    if step == "cleanup":
        place.assert_nothing_left(outputs=("web.yaml",) if not scope.cancelled_caught else ())
        return
    place.assert_nothing_left()
    about = [text for text in named if "may hold part of the guest" in text]
    if step in ("input", "convert"):
        assert about == []
        assert all(disk.read_bytes() == b"\xaa" * 32 * MIB for disk in disks)
    elif step in ("copy", "finalize"):
        assert len(about) == 2
