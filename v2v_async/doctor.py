"""What is installed here, what works, and the command that adds what is missing.

::

    examine() ── bindings, programs, plugins, filters: asked all at once, each in its own process
        ├─ KVM (remembered per boot), the appliance's kernel, free space
        ├─ the appliance itself: only when asked for, remembered
        └─> Report: findings, is_ok, commands that add what is missing

Nothing that v2v-async needs is imported here, so that this works where it is missing.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from subprocess import STDOUT
from typing import Any, Literal

import anyio

from v2v_async import appliance, cachedir, kvm
from v2v_async.errors import V2VError
from v2v_async.needs import (
    BINDINGS,
    DISTRIBUTIONS,
    FILTER_PACKAGE,
    FILTERS,
    KERNEL_PACKAGE,
    PLUGINS,
    PROGRAMS,
    QEMU_PACKAGE,
    Binding,
    Manager,
    Package,
    Program,
    Version,
    install_command,
    package_manager,
    parse_version,
)
from v2v_async.units import GIB, format_size

State = Literal["ok", "missing", "old", "warning", "unknown"]

ASK_LIMIT_S = 20.0
"""For one ‘--version’: they take under 0.1 s, so this is only for a program that never answers."""

LOW_SPACE = 2 * GIB
"""virt-v2v refuses to start with less than 1 GiB; the appliance and overlays need as much again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``is_needed``: nothing can be converted without it."""

    group: str
    name: str
    state: State
    is_needed: bool = False
    version: str = ""
    detail: str = ""
    package: Package | None = None
    fix: str | None = None

    @property
    def is_fatal(self) -> bool:
        """Return whether this alone stops a conversion."""
        return self.is_needed and self.state in ("missing", "old")


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found, in the order to show it."""

    findings: tuple[Finding, ...]
    manager: Manager | None

    @property
    def is_ok(self) -> bool:
        """Return whether everything needed is here."""
        return not any(finding.is_fatal for finding in self.findings)

    def commands(self, *, needed: bool) -> list[str]:
        """Return the commands that add what is missing: what is needed, or what is optional."""
        wanted = [f for f in self.findings if f.fix is not None and f.is_needed == needed]
        packages = sorted({name for f in wanted if (name := self._package_of(f))})
        others = dict.fromkeys(f.fix for f in wanted if f.fix and not self._package_of(f))
        install = [install_command(packages, self.manager)] if packages and self.manager else []
        return [*install, *others]

    def _package_of(self, finding: Finding) -> str:
        if finding.package is None or self.manager is None:
            return ""
        return str(getattr(finding.package, self.manager))

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        findings = [{**asdict(finding), "package": None} for finding in self.findings]
        for finding, document in zip(self.findings, findings, strict=True):
            document["package"] = self._package_of(finding) or None
        return {
            "version": 1,
            "ok": self.is_ok,
            "add_needed": self.commands(needed=True),
            "add_optional": self.commands(needed=False),
            "findings": findings,
        }


async def examine(*, with_appliance: bool = False, cache: Path | None = None) -> Report:
    """Look at everything. Takes well under 2 s once KVM's trial is remembered.

    Args:
        with_appliance: start libguestfs's appliance too, once (seconds to minutes).
        cache: where slow results are remembered (default: the cache folder).
    """
    cache = cache or cachedir.cache_dir()
    results: dict[int, list[Finding]] = {}

    async def keep(slot: int, look: Callable[[], Awaitable[list[Finding]]]) -> None:
        results[slot] = await look()

    looks: list[Callable[[], Awaitable[list[Finding]]]] = [
        _look_at_python,
        *(lambda binding=binding: _look_at_binding(binding) for binding in BINDINGS),
        *(lambda program=program: _look_at_program(program) for program in PROGRAMS),
        _look_at_nbdkit_parts,
        lambda: _look_at_virtualisation(with_appliance, cache),
    ]
    async with anyio.create_task_group() as group:
        for slot, look in enumerate(looks):
            group.start_soon(keep, slot, look)
    findings = [f for slot in sorted(results) for f in results[slot]] + [_look_at_space()]
    manager = package_manager()
    return Report(tuple(_with_fix(f, manager) for f in findings), manager)


def _with_fix(finding: Finding, manager: Manager | None) -> Finding:
    if finding.fix or finding.package is None or finding.state not in ("missing", "old"):
        return finding
    name = getattr(finding.package, manager) if manager else ""
    if not name:
        return finding
    return replace(finding, fix=install_command([name], manager or "apt"))


async def _ask(*argv: str) -> str | None:
    """Return what a program says; None when it fails, is missing or never answers."""
    try:
        # Not process.run: that needs setpriv, which is one of the programs to look for.
        with anyio.fail_after(ASK_LIMIT_S):
            done = await anyio.run_process(argv, stderr=STDOUT, check=False, start_new_session=True)
    except (OSError, TimeoutError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _judge(found: Version, minimum: Version) -> State:
    return "old" if found and found < minimum else "ok"


async def _look_at_python() -> list[Finding]:
    found = [
        Finding("Python", "python", "ok", True, platform.python_version(), sys.executable),
    ]
    for name in DISTRIBUTIONS:
        try:
            found.append(Finding("Python", name, "ok", True, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding("Python", name, "missing", True, fix="./scripts/setup"))
    return found


async def _look_at_binding(binding: Binding) -> list[Finding]:
    base = Finding(
        *("bindings", binding.name, "missing", binding.is_needed),
        detail=binding.purpose,
        package=binding.package,
    )
    # In a process of its own: a binding built for another Python may take this one down.
    said = await _ask(sys.executable, "-c", binding.code)
    if said is not None:
        version = parse_version(said)
        return [replace(base, state=_judge(version, binding.minimum), version=_text(version))]
    if await _ask("/usr/bin/python3", "-c", binding.code) is not None:
        detail = f"/usr/bin/python3 has it, {sys.executable} does not"
        return [replace(base, detail=detail, package=None, fix="./scripts/setup")]
    return [base]


async def _look_at_program(program: Program) -> list[Finding]:
    path = shutil.which(program.name) or shutil.which(program.also_at or program.name)
    base = Finding(
        *("programs", program.name, "missing", program.is_needed),
        detail=program.purpose,
        package=program.package,
    )
    if path is None:
        return [base]
    said = await _ask(path, program.version_option)
    if said is None:
        failed = f"{path} {program.version_option} fails"
        return [replace(base, state="warning", detail=failed)]
    version = parse_version(said)
    return [
        replace(base, state=_judge(version, program.minimum), version=_text(version), detail=path)
    ]


async def _look_at_nbdkit_parts() -> list[Finding]:
    config = await _ask("nbdkit", "--dump-config")
    if config is None:
        return []
    values = dict(line.split("=", 1) for line in config.splitlines() if "=" in line)
    plugins = Path(values.get("plugindir", "/nonexistent"))
    filters = Path(values.get("filterdir", "/nonexistent"))
    found = []
    for name, (is_needed, purpose, package) in PLUGINS.items():
        base = Finding("plugins", name, "missing", is_needed, "", purpose, _unless_here(package))
        if (plugins / f"nbdkit-{name}-plugin.so").exists():
            # A plugin that is there may still not load, for want of a library.
            said = await _ask("nbdkit", name, "--dump-plugin")
            state: State = "ok" if said else "warning" if not is_needed else "missing"
            version = parse_version(said.partition("\nversion=")[2]) if said else ()
            detail = "" if said else "it is installed but can't be loaded"
            base = replace(base, state=state, version=_text(version), detail=detail or purpose)
        found.append(base)
    of_filters = _unless_here(FILTER_PACKAGE)
    for name, (is_needed, purpose) in FILTERS.items():
        there = (filters / f"nbdkit-{name}-filter.so").exists()
        state = "ok" if there else "missing"
        found.append(Finding("filters", name, state, is_needed, "", purpose, of_filters))
    return found


def _unless_here(package: Package) -> Package | None:
    """Return None for the package that nbdkit itself came in: adding it again brings nothing."""
    is_here = package_manager() == "apt" and package.apt == "nbdkit"
    return None if is_here else package


async def _look_at_virtualisation(with_appliance: bool, cache: Path | None) -> list[Finding]:
    group = "virtualisation"
    found = []
    qemu = kvm.find_qemu()
    name = f"qemu-system-{platform.machine()}"
    base = Finding(group, name, "missing", True, "", "", QEMU_PACKAGE)
    if qemu is not None:
        said = await _ask(qemu, "--version")
        base = replace(base, state="ok", version=_text(parse_version(said or "")), detail=qemu)
    found.append(base)

    kernel = kvm.find_kernel()
    if kernel is not None:
        found.append(Finding(group, "kernel", "ok", True, "", str(kernel)))
    elif os.environ.get("LIBGUESTFS_PATH"):
        found.append(Finding(group, "kernel", "ok", True, "", "of $LIBGUESTFS_PATH's appliance"))
    else:
        found.append(_missing_kernel())

    status = await kvm.probe_kvm(cache)
    works: State = "ok" if status.is_usable else "warning"
    detail = f"{status.state}: {status.reason}"
    if not status.is_usable:
        detail += "; guests are emulated, which is slow" if status.state != "unknown" else ""
    fix = "sudo usermod -aG kvm $USER  # and log in again" if status.state == "denied" else None
    found.append(Finding(group, "KVM", works, False, _device_mode(), detail, fix=fix))
    found.append(await _look_at_appliance(status, with_appliance, cache))
    return found


def _missing_kernel() -> Finding:
    base = Finding(
        "virtualisation", "kernel", "missing", True, "", "none for the appliance in /boot"
    )
    if unreadable := sorted(Path("/boot").glob("vmlinuz-*")):
        # Ubuntu's kernels are 0600.
        return replace(base, detail="can't be read", fix=f"sudo chmod a+r {unreadable[-1]}")
    return replace(base, package=KERNEL_PACKAGE)


async def _look_at_appliance(
    status: kvm.KvmStatus, with_appliance: bool, cache: Path | None
) -> Finding:
    group, name = "virtualisation", "appliance"
    try:
        version = appliance.version()
    except V2VError:
        return Finding(group, name, "unknown", detail="not tried: the guestfs binding is missing")
    qemu, kernel = kvm.find_qemu(), kvm.find_kernel()
    identities = [cachedir.file_identity(path) for path in (qemu, kernel) if path]
    key = [list(version), status.state, os.getuid(), identities]
    known = cachedir.recall(cache, "appliance", key)
    if with_appliance:
        try:
            took = await appliance.try_launch(kvm.appliance_environment(status))
        except V2VError as error:
            return Finding(
                group, name, "missing", True, detail=error.message, fix="libguestfs-test-tool"
            )
        known = {"launch_s": round(took, 1), "time": time.time()}
        cachedir.remember(cache, "appliance", key, known)
    if known is None:
        return Finding(group, name, "unknown", detail="not tried: doctor --appliance tries it")
    return Finding(group, name, "ok", False, detail=f"started in {known.get('launch_s')} s")


def _look_at_space() -> Finding:
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    name = f"space in {folder}"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("space", name, "missing", True, detail=str(error), fix=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("space", name, "missing", True, "", "can't be written; set $TMPDIR")
    state: State = "ok" if free >= LOW_SPACE else "warning"
    advice = "" if free >= LOW_SPACE else "; set $TMPDIR to a folder with more"
    return Finding("space", name, state, False, "", f"{format_size(free)} free{advice}")


def _device_mode() -> str:
    try:
        return stat.filemode(os.stat("/dev/kvm").st_mode)
    except OSError:
        return ""


def _text(version: Version) -> str:
    return ".".join(map(str, version))
