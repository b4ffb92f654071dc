"""Programs and libraries that guests need and that are not here, each told once.

What only one kind of source or target needs (a plugin of nbdkit, libvirt's bindings, openstacksdk)
its own check asks for; here is what all of them need, and what an image must be opened with.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from v2v_async import kvm, nbdkit, virt_v2v_in_place
from v2v_async.batch.preflight.problems import Problem, of_guests
from v2v_async.errors import DependencyError
from v2v_async.needs import (
    BINDINGS,
    KERNEL_PACKAGE,
    PROGRAMS,
    QEMU_PACKAGE,
    Package,
    install_command,
    package_manager,
)
from v2v_async.options import GuestOptions

_FOR_ALL = ("setpriv", "nbdkit", "qemu-nbd", "qemu-img")
_TO_LOOK = frozenset(("setpriv", "nbdkit", "qemu-img"))
"""Without these a source can't even be looked at."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What is missing, as problems; ``can_look``: sources can be opened all the same."""

    problems: list[Problem] = field(default_factory=list)
    can_look: bool = True


async def missing(options: Mapping[str, GuestOptions]) -> Missing:
    """Return what is missing for these guests."""
    guests = list(options)
    absent = [name for name in _FOR_ALL if shutil.which(name) is None]
    problems = [_absent(name, guests) for name in absent]
    over_ssh = [name for name, each in options.items() if _logs_in(each)]
    if over_ssh and shutil.which("ssh") is None:
        problems.append(_absent("ssh", over_ssh))
    for binding in BINDINGS:
        if binding.is_needed and importlib.util.find_spec(binding.name) is None:
            what = f"the Python module ‘{binding.name}’ is not installed"
            problems.append(of_guests(guests, what, _adding(binding.package)))
    if not _TO_LOOK & set(absent):
        problems += await _conversion(guests)
    return Missing(problems, can_look=not _TO_LOOK & set(absent))


async def _conversion(guests: Iterable[str]) -> list[Problem]:
    """Return what keeps virt-v2v-in-place from running, and guests from being served."""
    found: list[Problem] = []
    for probe in (nbdkit.probe, virt_v2v_in_place.probe):
        try:
            await probe()
        except DependencyError as error:
            found.append(of_guests(guests, error.message, error.hint))
    if kvm.find_qemu() is None:
        what = "qemu, in which conversions work on the disks, is not installed"
        found.append(of_guests(guests, what, _adding(QEMU_PACKAGE)))
    if kvm.find_kernel() is None and not os.environ.get("LIBGUESTFS_PATH"):
        what = "there is no kernel that can be read, for the appliance that conversions work in"
        hint = _adding(KERNEL_PACKAGE) or "‘v2v-async doctor’ says more"
        found.append(of_guests(guests, what, hint))
    return found


def _absent(name: str, guests: Iterable[str]) -> Problem:
    package = next(program.package for program in PROGRAMS if program.name == name)
    return of_guests(guests, f"the program ‘{name}’ is not installed", _adding(package))


def _adding(package: Package) -> str | None:
    manager = package_manager()
    name = getattr(package, manager) if manager else ""
    return install_command([name], manager) if manager and name else None


def _logs_in(options: GuestOptions) -> bool:
    return options.input.kind == "xen-ssh" or options.input.transport == "ssh"
