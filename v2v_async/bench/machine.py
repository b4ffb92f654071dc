"""What a measurement ran on: processor, memory, kernel, and the version of every program."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from v2v_async import __version__, nbdkit

_ASK_LIMIT_S = 20.0


def describe() -> dict[str, str | int | float]:
    """Return what the machine is. ``memory`` is in bytes; ``load`` that of the last minute."""
    system = ""
    with suppress(OSError):
        system = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return {
        "cpu": _first(Path("/proc/cpuinfo"), r"^(?:model name|Model)\s*:\s*(.+)$")
        or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory("MemTotal"),
        "kernel": platform.release(),
        "system": system,
        "load": round(os.getloadavg()[0], 2),
    }


def memory(field: str) -> int:
    """Return a field of /proc/meminfo in bytes; 0 where it is not known."""
    return int(_first(Path("/proc/meminfo"), rf"^{field}:\s*(\d+) kB") or 0) * 1024


def busy_seconds() -> float:
    """Return the CPU time that everything used since boot. Source: proc_stat(5)."""
    ticks = _first(Path("/proc/stat"), r"^cpu +(.+)$") or ""
    user, nice, system, _idle, _iowait, *rest = [int(word) for word in ticks.split()] or [0] * 5
    # Then irq, softirq and steal; what guests used is in user already.
    return (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")


def versions(programs: dict[str, str]) -> dict[str, str]:
    """Return the versions of ``programs`` (name to path) and of what is always there."""
    found = {"v2v-async": __version__, "python": platform.python_version()}
    for name, path in {**programs, "nbdkit": "nbdkit"}.items():
        version = version_of(path)
        if version is not None:
            found[name] = version
    return found


def version_of(program: str) -> str | None:
    """Return the first version in what ``PROGRAM --version`` says; None when it says none."""
    try:
        done = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ASK_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\d+(?:\.\d+)+\S*", done.stdout)
    return match[0] if match else None


def ours() -> list[str]:
    """Return the command that runs this installation of v2v-async."""
    script = Path(sys.executable).with_name("v2v-async")
    return [str(script)] if script.exists() else [sys.executable, "-m", "v2v_async"]


def missing_for(argv: list[str]) -> str | None:
    """Return what a server's command line needs and is not here, None when all is."""
    program = argv[0]
    if shutil.which(program) is None:
        return f"{program} is not installed"
    if Path(program).name != "nbdkit":
        return None
    path = shutil.which(program)
    assert path is not None
    config = subprocess.run([path, "--dump-config"], capture_output=True, text=True).stdout
    features = nbdkit.parse_config(path, config)
    for name in filters_of(argv):
        if not features.has_filter(name):
            return f"nbdkit has no filter ‘{name}’"
    plugin = plugin_of(argv)
    if plugin is not None and not features.has_plugin(plugin):
        return f"nbdkit has no plugin ‘{plugin}’"
    return None


def filters_of(argv: list[str]) -> list[str]:
    """Return the filters that an nbdkit command line names."""
    return [word.partition("=")[2] for word in argv if word.startswith("--filter=")]


def plugin_of(argv: list[str]) -> str | None:
    """Return the plugin that an nbdkit command line names by its short name; None where unsure."""
    words = iter(argv[1:])
    for word in words:
        if word in ("-U", "--unix", "-t", "--threads", "-e", "--exportname", "--mask-handshake"):
            next(words, None)
        elif not word.startswith("-"):
            return word if re.fullmatch(r"[a-z][a-z0-9-]*", word) else None
    return None


def _first(path: Path, pattern: str) -> str | None:
    with suppress(OSError):
        match = re.search(pattern, path.read_text(), re.MULTILINE)
        return match[1].strip() if match else None
    return None
