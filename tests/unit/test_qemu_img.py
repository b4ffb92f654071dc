"""qemu-img: really called where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import require
from v2v_async import qemu_img
from v2v_async.errors import DependencyError
from v2v_async.qemu_img import ImageError


@pytest.fixture
def installed() -> None:
    require("qemu-img")


def test_info_as_qemu_7_prints_it() -> None:
    said = {
        "virtual-size": 536870912,
        "filename": "./system.img",
        "format": "raw",
        "actual-size": 2973696,
        "dirty-flag": False,
    }
    info = qemu_img.parse_info(said)
    assert (info.format, info.virtual_size, info.allocated) == ("raw", 536870912, 2973696)
    assert info.backing_file is None
    assert not info.is_encrypted


@pytest.mark.anyio
@pytest.mark.usefixtures("installed")
async def test_create_and_info(tmp_path: Path) -> None:
    base = tmp_path / "base"
    await qemu_img.create_qcow2(base, 3 << 20)
    info = await qemu_img.info(base)
    assert (info.format, info.virtual_size, info.backing_file) == ("qcow2", 3 << 20, None)
    top = tmp_path / "a:b, c%41"
    await qemu_img.create_qcow2(top, 3 << 20, backing=(str(base), "qcow2"))
    info = await qemu_img.info(top)
    assert info.backing_file == str(base)
    assert (await qemu_img.info(top, format_="raw")).format == "raw"


@pytest.mark.anyio
@pytest.mark.usefixtures("installed")
async def test_preallocation_takes_the_room(tmp_path: Path) -> None:
    size = 8 << 20
    for kind, least in (("off", 0), ("falloc", size)):
        path = tmp_path / kind
        await qemu_img.create_qcow2(path, size, preallocation=kind)  # type: ignore[arg-type]
        allocated = path.stat().st_blocks * 512
        assert least <= allocated
        assert kind == "falloc" or allocated < size


@pytest.mark.anyio
@pytest.mark.usefixtures("installed")
async def test_errors_name_the_image_and_the_reason(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ImageError, match="No such file") as caught:
        await qemu_img.info(missing)
    assert caught.value.path == str(missing)
    assert str(missing) in str(caught.value)
    text = tmp_path / "text"
    text.write_text("not an image")
    with pytest.raises(ImageError, match="qcow2"):
        await qemu_img.info(text, format_="qcow2")
    with pytest.raises(ImageError, match="create"):
        await qemu_img.create_qcow2(tmp_path / "no" / "dir", 1 << 20)


@pytest.mark.anyio
async def test_without_qemu_img(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError):
        await qemu_img.info("/x")


@pytest.mark.anyio
async def test_an_answer_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "qemu-img"
    program.write_text("#!/bin/sh\necho '{}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ImageError, match="not understood"):
        await qemu_img.info("/x")
