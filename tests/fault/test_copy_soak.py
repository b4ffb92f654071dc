"""A short soak: a few seeds of ``scripts/soak``, which kills servers and copiers at random."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, require

SOAK = ROOT / "scripts" / "soak"


Lines = list[dict[str, Any]]


def soak(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Lines]:
    """Run it with small disks in ``folder``; return also its lines."""
    log = folder / "rounds"
    done = subprocess.run(
        [str(SOAK), "--small", f"--work={folder}", f"--log={log}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("seed", [7, 8])
def test_nothing_is_lost_or_wrong(short_tmp: Path, seed: int) -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "nbdcopy")
    done, rounds = soak(short_tmp, f"--seed={seed}", "--rounds=4")
    assert done.returncode == 0, done.stdout
    assert "wrong 0" in done.stdout
    assert sorted(line["round"] for line in rounds) == [0, 1, 2, 3]
    # It would prove nothing where nothing happened.
    hits = {kind for line in rounds for kind in line if kind.endswith(" hit")}
    assert hits - {"nothing hit"}
    assert [entry.name for entry in short_tmp.iterdir()] == ["rounds"]


def test_it_tells_a_wrong_byte(short_tmp: Path) -> None:
    """The same comparison, of a target with one bit turned."""
    # An annotation of a dataclass is looked up in its module, by name.
    spec = importlib.util.spec_from_file_location("soaklib", SOAK.with_name("soaklib.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["soaklib"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["soaklib"]
    library: dict[str, Any] = vars(module)
    disk = library["Disk"](
        size=100_001, slack=512, content="dense", source="file", target="file", is_dirty=True
    )
    source, target = short_tmp / "s", short_tmp / "t"
    library["write_source"](source, disk, random.Random(1))
    content = bytearray(source.read_bytes())

    def wrong() -> list[tuple[int, int]]:
        target.write_bytes(content + bytes([library["FILL"]]) * 512)
        found: list[tuple[int, int]] = library["wrong_ranges"](source, target, disk)
        return found

    assert wrong() == []
    content[50_000] ^= 1
    assert wrong() == [(49152, 4096)]
    content[53_300] ^= 1  # the next block
    content[100_000] ^= 1
    assert wrong() == [(49152, 8192), (98304, 1697)]
