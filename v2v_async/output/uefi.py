"""Where UEFI firmware for guests is on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v2v_async.events import Reporter
from v2v_async.model import TargetGuest


@dataclass(frozen=True, slots=True)
class UefiFirmware:
    """Code to run, and the file that each guest's variables begin as a copy of."""

    code: str
    variables: str
    is_secure: bool = False


# In the order of preference: without secure boot first, since few guests need it and those that
# were not enrolled would not boot. The 4M pairs are all that newer Debians have.
_KNOWN: dict[str, tuple[UefiFirmware, ...]] = {
    "x86_64": (
        UefiFirmware("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        UefiFirmware("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        UefiFirmware("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        UefiFirmware(
            "/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"
        ),
        UefiFirmware(
            "/usr/share/OVMF/OVMF_CODE.secboot.fd", "/usr/share/OVMF/OVMF_VARS.fd", is_secure=True
        ),
        UefiFirmware(
            "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd",
            "/usr/share/OVMF/OVMF_VARS_4M.fd",
            is_secure=True,
        ),
        UefiFirmware(
            "/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd",
            "/usr/share/edk2/ovmf/OVMF_VARS.fd",
            is_secure=True,
        ),
    ),
    "aarch64": (
        UefiFirmware("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        UefiFirmware(
            "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",
            "/usr/share/edk2/aarch64/vars-template-pflash.raw",
        ),
    ),
}


def find_uefi(
    arch: str, *, secure: bool = False, exists: Callable[[str], bool] = lambda p: Path(p).exists()
) -> UefiFirmware | None:
    """Return the first known firmware for ``arch`` that is installed here, None without any.

    With ``secure`` only one that does secure boot.
    """
    for firmware in _KNOWN.get(arch, ()):
        if (firmware.is_secure or not secure) and all(
            map(exists, (firmware.code, firmware.variables))
        ):
            return firmware
    return None


def uefi_for(target: TargetGuest, reporter: Reporter, *, without: str) -> UefiFirmware | None:
    """Return the firmware for a guest that needs UEFI; None, with a warning, where there is none.

    Also None, without a warning, for a guest that needs none. ``without`` says what follows from
    there being none, and what to do.
    """
    if target.firmware != "uefi":
        return None
    uefi = find_uefi(target.guestcaps.arch, secure=target.secure_boot)
    if uefi is None:
        reporter.warning(f"the guest needs UEFI, and no such firmware was found here: {without}")
    return uefi
