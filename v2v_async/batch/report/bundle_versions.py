"""The versions of everything that takes part in a conversion."""

from __future__ import annotations

import platform
import shutil
from functools import cache

from v2v_async import __version__
from v2v_async.bench.machine import describe, version_of
from v2v_async.needs import PROGRAMS

_ASKED = ("nbdkit", "qemu-nbd", "qemu-img", "virt-v2v-in-place")


@cache
def versions() -> dict[str, str | None]:
    """Return the versions by name, None where something is missing. Blocks for a second, once."""
    machine = describe()
    return {
        "v2v-async": __version__,
        **{
            program.name: _version(program.name, program.also_at)
            for program in PROGRAMS
            if program.name in _ASKED
        },
        "libnbd": _libnbd(),
        "python": platform.python_version(),
        "kernel": str(machine["kernel"]),
        "distribution": str(machine["system"]),
        "processor": f"{machine['cores']} × {machine['cpu']}",
        "memory": f"{machine['memory']} bytes",
    }


def _version(name: str, also_at: str) -> str | None:
    path = shutil.which(name) or (also_at and shutil.which(also_at))
    return version_of(path) if path else None


def _libnbd() -> str | None:
    try:
        from v2v_async.handle import version
    except ImportError:
        return None
    return version()
