"""The unpacked kernel of an emulated appliance: made, tried, and left out where it is of no use."""

from __future__ import annotations

import gzip
import lzma
import os
import shlex
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from v2v_async import emulation
from v2v_async.emulation import emulation_environment, unpacked
from v2v_async.kvm import KvmStatus, find_kernel, find_qemu

BROKEN = KvmStatus("broken", "for a test")
ELF = b"\x7fELF" + bytes(range(256)) * 40


def image(payload: bytes, *, version: int = 0x20F) -> bytes:
    """A kernel image as the boot protocol has it: two setup sectors, then the packed kernel."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    return bytes(setup) + bytes(64) + payload + b"behind it"


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: lzma.compress(data)])
def test_what_is_packed(pack: object) -> None:
    assert unpacked(image(pack(ELF) + b"\0\0\0\0")) == ELF  # type: ignore[operator]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no kernel" * 200,
        image(b"\x28\xb5\x2f\xfd zstd"),
        image(gzip.compress(b"no ELF")),
        image(lzma.compress(ELF)[:-9]),
        image(b"\xfd7zXZ\0 damaged" * 10),
        image(gzip.compress(ELF), version=0x207),
    ],
)
def test_what_can_not_be_unpacked(content: bytes) -> None:
    assert unpacked(content) is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "the cache"  # the script has to quote it
    monkeypatch.setenv("V2V_ASYNC_CACHE", str(folder))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("LIBGUESTFS_HV", "LIBGUESTFS_QEMU", "LIBGUESTFS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return folder


def programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, says: str = "Linux version\nKernel panic"
) -> tuple[Path, Path]:
    """Put in place a kernel, and a qemu that notes its words and says something."""
    kernel, qemu = folder / "vmlinuz", folder / "qemu-system"
    kernel.write_bytes(image(gzip.compress(ELF)))
    qemu.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >> {folder}/words\nprintf '{says}\\n'\n")
    qemu.chmod(0o755)
    monkeypatch.setattr(emulation, "find_kernel", lambda: kernel)
    monkeypatch.setattr(emulation, "find_qemu", lambda: str(qemu))
    return kernel, qemu


@pytest.mark.anyio
async def test_made_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = programs(tmp_path, monkeypatch)
    found = await emulation_environment(BROKEN, {})
    script = Path(found["LIBGUESTFS_HV"])
    assert (script.parent / "vmlinux").read_bytes() == ELF
    # libguestfs has a copy of the kernel. What else is named so stays.
    copy = tmp_path / "kernel"
    copy.write_bytes(kernel.read_bytes())
    (tmp_path / "words").unlink()
    words = ["-m", "a b", "-kernel", str(copy), "-append", "-kernel", "-initrd", "it's"]
    subprocess.run([script, *words], check=True, stdout=subprocess.DEVNULL)
    wanted = [str(script.parent / "vmlinux") if word == str(copy) else word for word in words]
    assert (tmp_path / "words").read_text().splitlines() == wanted
    # Another kernel is another's.
    copy.write_bytes(b"another")
    (tmp_path / "words").unlink()
    subprocess.run([script, "-kernel", str(copy)], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "words").read_text().splitlines() == ["-kernel", str(copy)]
    (tmp_path / "words").unlink()
    assert await emulation_environment(BROKEN, {}) == found
    assert not (tmp_path / "words").exists(), "it was not tried again"


@pytest.mark.anyio
async def test_one_that_does_not_start_is_left_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch, says="Error loading uncompressed kernel without PVH ELF Note")
    assert await emulation_environment(BROKEN, {}) == {}
    (tmp_path / "words").unlink()
    assert await emulation_environment(BROKEN, {}) == {}
    assert not (tmp_path / "words").exists(), "it was not tried again"
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.anyio
async def test_what_was_removed_is_made_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(tmp_path, monkeypatch)
    script = Path((await emulation_environment(BROKEN, {}))["LIBGUESTFS_HV"])
    script.unlink()
    (script.parent / "vmlinux").unlink()
    script.parent.rmdir()
    assert await emulation_environment(BROKEN, {}) == {"LIBGUESTFS_HV": str(script)}
    assert script.exists()


@pytest.mark.anyio
async def test_old_ones_go(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, used = cache / "kernel-old", cache / "kernel-used"
    for path in (old, used):
        path.mkdir(parents=True)
    os.utime(old, (0, time.time() - 8 * 24 * 3600))
    programs(tmp_path, monkeypatch)
    assert await emulation_environment(BROKEN, {})
    assert not old.exists()
    assert used.exists()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "environ"),
    [
        (KvmStatus("works", ""), {}),
        (KvmStatus("unknown", ""), {}),
        (BROKEN, {"LIBGUESTFS_HV": "/usr/bin/qemu"}),
        (BROKEN, {"LIBGUESTFS_QEMU": "/usr/bin/qemu"}),
        (BROKEN, {"LIBGUESTFS_BACKEND": "libvirt"}),
        (KvmStatus("absent", ""), {"LIBGUESTFS_BACKEND": "libvirt"}),
    ],
)
async def test_where_it_has_no_place(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: KvmStatus,
    environ: dict[str, str],
) -> None:
    programs(tmp_path, monkeypatch)
    assert await emulation_environment(status, environ) == {}
    assert not cache.exists()


@pytest.mark.anyio
async def test_no_place_to_keep_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file")
    programs(tmp_path, monkeypatch)
    assert await emulation_environment(BROKEN, {}) == {}


@pytest.mark.anyio
@pytest.mark.skipif(sys.platform != "linux", reason="a Linux kernel")
async def test_a_real_kernel(cache: Path) -> None:
    """It says its first words by the script; shorter than by qemu is benchmarks/'s to say."""
    kernel, qemu = find_kernel(), find_qemu()
    if kernel is None or qemu is None:
        pytest.skip("no kernel and qemu here")
    if unpacked(kernel.read_bytes()) is None:
        pytest.skip(f"{kernel} is packed in a way that is not unpacked")
    found = await emulation_environment(BROKEN, {})
    script = Path(found["LIBGUESTFS_HV"])
    assert shlex.quote(str(kernel)) in script.read_text()
    assert (script.parent / "vmlinux").stat().st_size > kernel.stat().st_size
