"""Whether KVM really works here, found out by starting a kernel under it.

``/dev/kvm`` may be there and open, and still be of no use: in some nested virtual machines qemu
aborts (``kvm_buf_set_msrs``), in others a boot sector runs but a Linux kernel hangs before its
first message. libguestfs would then fail or hang with it. So the trial starts what the appliance
starts: a Linux kernel, with nothing else.

::

    /dev/kvm ── not there ───────────────────────────> absent    libguestfs emulates by itself
        └ can't be opened ───────────────────────────> denied    emulate
        └ opens ─ no qemu, or no kernel to start ────> unknown   leave it to libguestfs
                └ trial ─ panics for want of a root ─> works
                        └ silence, abort, restart ───> broken    emulate
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Literal, get_args

import anyio
from anyio.abc import ByteReceiveStream, Process

from v2v_async.cachedir import cache_dir as default_cache_dir
from v2v_async.cachedir import file_identity, recall, remember
from v2v_async.errors import DependencyError
from v2v_async.process import describe_status, end, start

KvmState = Literal["works", "absent", "denied", "broken", "unknown"]

SPIN_S = 4.0
"""qemu used this much processor time without a word from the kernel: it hangs, spinning.

Measured *emulated*: 3.8 s before the kernel's first line (it unpacks itself), 0.3 s at most between
others. KVM that is slower than that is of no use. Counting processor time, not the clock's, a busy
host does not make a good kernel look like one that hangs.
"""

SILENCE_S = 12.0
"""No word for this long, by the clock: it hangs without using the processor, or the host is so busy
that nobody can tell."""

LIMIT_S = 40.0
"""For the whole trial: a kernel that talks but never ends."""

_LOOK_S = 0.5

_CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}


@dataclass(frozen=True, slots=True)
class KvmStatus:
    """What was found out. ``reason`` is a clause for people: "KVM works: REASON"."""

    state: KvmState
    reason: str

    @property
    def is_usable(self) -> bool:
        """Return whether a guest can run under KVM."""
        return self.state == "works"


async def probe_kvm(
    cache_dir: Path | None = None,
    *,
    device: Path = Path("/dev/kvm"),
    qemu: str | None = None,
    kernel: Path | None = None,
) -> KvmStatus:
    """Find out whether KVM works, by a trial at most once per boot of the host.

    Never raises for what it finds. The trial's processes are gone afterwards, also when cancelled.

    Args:
        cache_dir: where the result is remembered (default: the cache folder).
        device: KVM's device node.
        qemu: the emulator (default: libguestfs's, ``$LIBGUESTFS_HV`` or ``qemu-system-ARCH``).
        kernel: the kernel to start (default: :func:`find_kernel`).
    """
    unusable = _device_status(device)
    if unusable is not None:
        return unusable
    qemu = qemu or find_qemu()
    if qemu is None:
        return KvmStatus("unknown", f"qemu-system-{platform.machine()} is not installed")
    kernel = kernel or find_kernel()
    if kernel is None:
        return KvmStatus("unknown", "no kernel that can be read, in /boot or of the appliance")
    key = [_boot_id(), os.getuid(), file_identity(qemu), file_identity(kernel)]
    folder = cache_dir or default_cache_dir()
    known = _from_cache(recall(folder, "kvm", key))
    if known is not None:
        return known
    status = await _trial(qemu, kernel)
    if status.state != "unknown":
        remember(folder, "kvm", key, {"state": status.state, "reason": status.reason})
    return status


def appliance_environment(
    status: KvmStatus, environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the variables that libguestfs needs so that its appliance starts nevertheless.

    Empty where KVM works, is absent (libguestfs notices that itself) or nobody knows. What the user
    set is kept: another backend, other settings, and ``force_kvm`` above all.
    Source: guestfs(3), BACKEND SETTINGS.
    """
    if status.state not in ("denied", "broken"):
        return {}
    environ = os.environ if environ is None else environ
    settings = [s for s in environ.get("LIBGUESTFS_BACKEND_SETTINGS", "").split(":") if s]
    needed = {}
    if not environ.get("LIBGUESTFS_BACKEND"):
        # The libvirt backend (Fedora's default) asks libvirt, which believes in /dev/kvm.
        needed["LIBGUESTFS_BACKEND"] = "direct"
    if not any(setting.startswith("force_") for setting in settings):
        needed["LIBGUESTFS_BACKEND_SETTINGS"] = ":".join([*settings, "force_tcg"])
    return needed


def find_qemu() -> str | None:
    """Return the emulator that libguestfs would start, None when there is none."""
    chosen = os.environ.get("LIBGUESTFS_HV") or os.environ.get("LIBGUESTFS_QEMU")
    if chosen:
        return which(chosen)
    # Red Hat's own is not in the PATH.
    return which(f"qemu-system-{platform.machine()}") or which("/usr/libexec/qemu-kvm")


def find_kernel() -> Path | None:
    """Return a kernel that can be read: the newest installed one, or the cached appliance's."""
    chosen = os.environ.get("SUPERMIN_KERNEL")
    found = [Path(chosen)] if chosen else []
    installed = [
        *(path for path in Path("/boot").glob("vmlinuz-*") if "rescue" not in path.name),
        *Path("/lib/modules").glob("*/vmlinuz"),
    ]
    found += sorted(installed, key=_version, reverse=True)
    cache = os.environ.get("LIBGUESTFS_CACHEDIR") or os.environ.get("TMPDIR") or "/var/tmp"
    found.append(Path(cache, f".guestfs-{os.getuid()}", "appliance.d", "kernel"))
    return next((path for path in found if path.is_file() and os.access(path, os.R_OK)), None)


def judge(console: bytes, status: int | None, errors: str) -> KvmStatus:
    """Return what a trial means.

    Args:
        console: what the kernel said.
        status: how qemu ended; None when it had to be ended.
        errors: what qemu itself said.
    """
    has_booted = b"Linux version" in console
    if has_booted and (b"Kernel panic" in console or status == 0):
        return KvmStatus("works", "a kernel started under it")
    last = errors.strip().rpartition("\n")[2]
    if status is None:
        after = "after its first messages" if has_booted else "before its first message"
        return KvmStatus(
            "broken", f"/dev/kvm is there, but a kernel started under it hangs {after}"
        )
    if status == 0:
        return KvmStatus(
            "broken", "/dev/kvm is there, but a kernel started under it restarts at once"
        )
    said = f" ({last})" if last else ""
    return KvmStatus(
        "broken", f"/dev/kvm is there, but qemu fails with it: {describe_status(status)}{said}"
    )


def trial_command(qemu: str, kernel: Path, machine: str) -> list[str]:
    """Return the command that starts only a kernel, which panics, which ends qemu."""
    console = _CONSOLES.get(machine, "ttyS0")
    # Without earlyprintk all messages come late, at once: a slow start looks like a hang.
    early = "earlyprintk=serial,ttyS0" if machine == "x86_64" else "earlycon"
    return [
        *(qemu, "-nodefaults", "-no-user-config", "-display", "none"),
        *(["-machine", "virt"] if machine == "aarch64" else []),
        *("-accel", "kvm", "-cpu", "max" if machine == "x86_64" else "host"),
        *("-m", "512", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel), "-append", f"console={console} {early} panic=-1"),
    ]


async def _trial(qemu: str, kernel: Path) -> KvmStatus:
    try:
        # Cancelled in the middle of this, asyncio would kill qemu alone and forget its group.
        with anyio.CancelScope(shield=True):
            process = await start(trial_command(qemu, kernel, platform.machine()))
    except (DependencyError, OSError) as error:
        return KvmStatus("unknown", f"{qemu} can't be started: {error}")
    assert process.stdout is not None
    assert process.stderr is not None
    console, errors = bytearray(), bytearray()
    try:
        with anyio.move_on_after(LIMIT_S):
            async with anyio.create_task_group() as group:
                group.start_soon(_drain, process.stderr, errors)
                await _listen(process, console)
                group.cancel_scope.cancel()
        status = process.returncode
    finally:
        await end(process, grace_s=1.0)
        with anyio.CancelScope(shield=True):
            await process.aclose()
    return judge(bytes(console), status, errors.decode(errors="replace"))


async def _listen(process: Process, console: bytearray) -> None:
    """Collect the console's output until the kernel panics, qemu ends, or the kernel hangs."""
    assert process.stdout is not None
    since, used = anyio.current_time(), 0.0
    while b"Kernel panic" not in console:
        with anyio.move_on_after(_LOOK_S):
            try:
                console += await process.stdout.receive()
            except anyio.EndOfStream:
                # The streams close a moment before the process can be waited for.
                await process.wait()
                return
            since, used = anyio.current_time(), _processor_s(process.pid)
        if anyio.current_time() - since > SILENCE_S or _processor_s(process.pid) - used > SPIN_S:
            return


def _processor_s(pid: int) -> float:
    """Return the processor time that ``pid`` has used. Source: proc_pid_stat(5), fields 14, 15."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _drain(stream: ByteReceiveStream, into: bytearray) -> None:
    async for chunk in stream:
        into += chunk


def _device_status(device: Path) -> KvmStatus | None:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            return KvmStatus("denied", f"{device} can't be opened by this user (group kvm)")
        # ENOENT; or a node without its kernel module: ENODEV, ENXIO.
        return KvmStatus("absent", f"{device}: {error.strerror}")
    return None


def _from_cache(fact: dict[str, object] | None) -> KvmStatus | None:
    if fact is None or fact.get("state") not in get_args(KvmState):
        return None
    return KvmStatus(fact["state"], str(fact.get("reason")))  # type: ignore[arg-type]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _version(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts 6.10 after 6.9."""
    text = path.parent.name if path.name == "vmlinuz" else path.name.removeprefix("vmlinuz-")
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", text)
    ]
