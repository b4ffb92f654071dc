"""Where there is no KVM: an appliance whose kernel need not unpack itself, which is emulated too.

Of the time that an emulated kernel takes to its first message, nine tenths go into its own
decompression: 4.8 s of processor time where an unpacked one needs 0.6 s, once for each conversion.
So the kernel is unpacked once and kept in the cache folder, together with a script that stands
between libguestfs and qemu and names it in place of the packed one::

    libguestfs ── -kernel …/appliance.d/kernel ──> KEY/qemu ── -kernel KEY/vmlinux ──> qemu

Tried before it is used, and left out wherever something is not as it is known to work.
Source: the kernel's x86 boot protocol (payload_offset, 2.08 and newer); PVH, by which qemu starts
an unpacked kernel.
"""

from __future__ import annotations

import lzma
import os
import platform
import shlex
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import anyio.to_thread

from v2v_async import appliance
from v2v_async.cachedir import cache_dir, file_identity, path_of, recall, remember
from v2v_async.durable import sync
from v2v_async.errors import DependencyError, V2VError
from v2v_async.kvm import KvmStatus, find_kernel, find_qemu
from v2v_async.process import run

TRIAL_LIMIT_S = 120.0
"""A kernel needs 3 s from its start to its panic, emulated."""

_UNUSED_S = 7 * 24 * 3600
"""Kernels that nobody asked for so long are removed."""

_SCRIPT = """\
#!/bin/sh
# Made by v2v-async: starts qemu with a kernel that is unpacked already.
for word do
    shift
    if [ "$before" = -kernel ] && cmp -s -- "$word" {kernel}; then
        word={unpacked}
    fi
    before=$word
    set -- "$@" "$word"
done
exec {qemu} "$@"
"""


async def emulation_environment(
    status: KvmStatus, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the variables with which libguestfs starts an emulated appliance faster.

    Empty where KVM works, where the user chose a qemu or a backend that is not ``direct``, and
    where the kernel can't be unpacked. The first call takes some seconds.
    """
    environ = os.environ if environ is None else environ
    folder = cache_dir()
    if (
        status.state not in ("absent", "denied", "broken")
        or platform.machine() != "x86_64"
        or environ.get("LIBGUESTFS_HV")
        or environ.get("LIBGUESTFS_QEMU")
        or folder is None
    ):
        return {}
    if status.state == "absent" and not _is_direct(environ):
        return {}  # the others are given the direct backend (kvm.appliance_environment)
    if environ.get("LIBGUESTFS_BACKEND", "direct") != "direct":
        return {}
    qemu, kernel = find_qemu(), find_kernel()
    if qemu is None or kernel is None:
        return {}
    key = [file_identity(qemu), file_identity(kernel), _SCRIPT]
    made = path_of(folder, "kernel", key).with_suffix("")
    script = made / "qemu"
    fact = recall(folder, "kernel-trial", key)
    if fact is None or (fact.get("works") and not os.access(script, os.X_OK)):
        works = await _make(qemu, kernel, made)
        remember(folder, "kernel-trial", key, {"works": works})
        fact = {"works": works}
    if not fact.get("works"):
        return {}
    with suppress(OSError):
        os.utime(made)
    return {"LIBGUESTFS_HV": str(script)}


def _is_direct(environ: Mapping[str, str]) -> bool:
    """Whether libguestfs starts qemu itself."""
    try:
        return (environ.get("LIBGUESTFS_BACKEND") or appliance.backend()) == "direct"
    except DependencyError:
        return False


async def _make(qemu: str, kernel: Path, made: Path) -> bool:
    """Make the folder of an unpacked kernel and try it; return whether it is there and works."""
    work: Path | None = None
    try:
        content = await anyio.to_thread.run_sync(lambda: unpacked(kernel.read_bytes()))
        if content is None:
            return False
        made.parent.mkdir(parents=True, exist_ok=True)
        _remove_unused(made.parent)
        work = Path(tempfile.mkdtemp(prefix=".kernel-", dir=made.parent))
        work.chmod(0o755)  # libguestfs may run qemu as somebody else
        (work / "vmlinux").write_bytes(content)
        _write_script(work / "qemu", qemu, kernel, work / "vmlinux")
        if not await _starts(work / "qemu", kernel):
            return False
        _write_script(work / "qemu", qemu, kernel, made / "vmlinux")
        for path in (work / "vmlinux", work / "qemu", work):
            sync(path)  # half a kernel, after a loss of power, would fail each conversion
        with suppress(OSError):  # another process has just made it
            os.rename(work, made)
        return os.access(made / "qemu", os.X_OK)
    except (OSError, V2VError, TimeoutError):
        return False
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _write_script(path: Path, qemu: str, kernel: Path, vmlinux: Path) -> None:
    names = {"kernel": str(kernel), "unpacked": str(vmlinux), "qemu": qemu}
    path.write_text(_SCRIPT.format(**{name: shlex.quote(text) for name, text in names.items()}))
    path.chmod(0o755)


def unpacked(image: bytes) -> bytes | None:
    """Return the ELF file that is packed in a kernel; None where that can't be done."""
    try:
        if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, 0x206)[0] < 0x208:
            return None
        setup_sectors = image[0x1F1] or 4
        offset, length = struct.unpack_from("<II", image, 0x248)
    except (IndexError, struct.error):
        return None
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    try:
        if payload.startswith(b"\xfd7zXZ\0"):
            xz = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            found, is_whole = xz.decompress(payload), xz.eof
        elif payload.startswith(b"\x1f\x8b"):
            gz = zlib.decompressobj(16 + zlib.MAX_WBITS)
            found, is_whole = gz.decompress(payload), gz.eof
        else:
            return None
    except (lzma.LZMAError, zlib.error):
        return None
    return found if is_whole and found.startswith(b"\x7fELF") else None


async def _starts(script: Path, kernel: Path) -> bool:
    """Start only the kernel, by the script: it panics for want of a root, which ends qemu."""
    done = await run(
        [
            *(str(script), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "accel=tcg", "-cpu", "max", "-m", "512", "-serial", "stdio"),
            *("-no-reboot", "-kernel", str(kernel), "-append", "console=ttyS0 panic=-1"),
        ],
        timeout_s=TRIAL_LIMIT_S,
    )
    return "Linux version" in done.stdout and "Kernel panic" in done.stdout


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("kernel-*"):
        with suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(path, ignore_errors=True)
