"""scripts/twenty-guests: the guests and the plan that docs/batch.md walks through."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from v2v_async.batch.plan.file import read_plan
from v2v_async.cli import virt_v2v
from v2v_async.events import Reporter
from v2v_async.input.registry import parse_input
from v2v_async.output.registry import parse_output

SCRIPT = ROOT / "scripts" / "twenty-guests"


def make(folder: Path) -> subprocess.CompletedProcess[str]:
    require("mke2fs", "dash", "qemu-img")
    return subprocess.run([SCRIPT, folder], capture_output=True, text=True)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A name that a careless script would trip over.
    folder = tmp_path_factory.mktemp("twenty") / 'a "b" {c}'
    done = make(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'plan.toml'}\n"
    return folder


@pytest.mark.anyio
async def test_all_of_them_can_be_opened(twenty: Path) -> None:
    plan = read_plan(twenty / "plan.toml")
    names = [guest.name for guest in plan.guests]
    assert names == [
        *(f"web{number:02}" for number in range(1, 11)),
        *(f"app{number:02}" for number in range(1, 7)),
        *("db01", "db02", "db03", "scratch"),
    ]
    macs = set()
    for guest in plan.guests:
        options = virt_v2v.guest_options(virt_v2v.read(guest.words()))
        source = parse_input(options.input)
        await source.check(Reporter(lambda _: None, "t"))
        described = await source.describe()
        assert len(described.disks) == (2 if guest.name.startswith("db") else 1)
        if guest.input.type == "libvirtxml":
            assert described.name == guest.name
            macs.add(described.nics[0].mac)
        parse_output(options.output)
    assert len(macs) == 9
    assert [guest.priority for guest in plan.guests[:3]] == [5, 5, 0]
    assert plan.guests[0].group in plan.limits.groups
    assert list((twenty / "out").iterdir()) == []


def begin(image: Path) -> bytes:
    with image.open("rb") as file:
        return file.read(32)


def test_their_disks_differ_and_are_sparse(twenty: Path) -> None:
    images = sorted((twenty / "images").iterdir())
    assert len(images) == 23
    assert len({begin(image) for image in images}) == 20  # a guest's two begin alike
    allocated = sum(image.stat().st_blocks * 512 for image in images)
    assert allocated < sum(image.stat().st_size for image in images) / 4


def test_they_are_the_same_each_time(twenty: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert make(again).returncode == 0
    for name in ("images/web07.img", "images/db02-data.img", "images/scratch.img", "guests.csv"):
        digests = {
            hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (twenty, again)
        }
        assert len(digests) == 1, name


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = make(tmp_path)
    assert done.returncode == 1
    assert "is there already, and not an empty folder" in done.stderr
    assert os.listdir(tmp_path) == ["mine"]
