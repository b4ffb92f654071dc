"""What virt-v2v-in-place learnt about the guest, read from its debugging output and ``-O`` file.

::

    i_root = /dev/sda1                  inspection, printed before the guest is touched: the first
    i_type = linux                      block counts
    …
    i_firmware = BIOS                   in 2.2; newer ones have the line below instead
    …
    gcaps_block_bus = virtio-blk        guestcaps, printed after the conversion: the last block
    …                                   counts
    target firmware: bios               2.4 and newer: the last ones count
    target boot device: 0
    <v2v-inspection>                   -O FILE, 2.8 and newer: firmware, inspection, no guestcaps

Commands of the guest run in between, and what they print is in the same output. A hostile guest
may therefore forge these lines; all that this can do is choose its own virtual hardware, from the
values allowed here, and the name of its system.

What the appliance's console says is there too, as it comes. Its last line may still lack its end
when a block is printed, which then begins in the middle of a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from v2v_async.model import Firmware, Guestcaps, Inspection, SourceGuest

_INSPECTION, _GUESTCAPS = "i_", "gcaps_"
_FIRMWARE, _BOOT_DEVICE = "target firmware: ", "target boot device: "
_BEGINNING = re.compile(f"(?:i_root|gcaps_block_bus) = |{_FIRMWARE}|{_BOOT_DEVICE}")


class PropertyReader:
    """Picks the properties out of the debugging output, given line by line."""

    def __init__(self) -> None:
        self.inspection: dict[str, str] = {}
        self.guestcaps: dict[str, str] = {}
        self.boot_device: int | None = None
        """Which disk it boots from, counted from 0, where it was printed."""
        self._target_firmware: str | None = None
        self._block: dict[str, str] = {}
        self._prefix = ""

    @property
    def firmware(self) -> str | None:
        """The firmware, as it was printed."""
        return self.inspection.get("firmware") or self._target_firmware

    def feed(self, line: str) -> None:
        """Take the next line, without its newline."""
        if (beginning := _BEGINNING.search(line)) is not None:
            line = line[beginning.start() :]
        if line.startswith(_FIRMWARE):
            self._target_firmware = line.removeprefix(_FIRMWARE).strip()
        elif line.startswith(_BOOT_DEVICE):
            device = line.removeprefix(_BOOT_DEVICE).strip()
            self.boot_device = int(device) if device.isdecimal() else None
        name, separator, value = line.partition(" = ")
        if not separator and line.endswith(" ="):
            name, separator, value = line.removesuffix(" ="), "=", ""
        prefix = next((p for p in (_INSPECTION, _GUESTCAPS) if name.startswith(p)), "")
        if not separator or not prefix or not name.replace("_", "").isalnum():
            self._close()
            return
        if prefix != self._prefix:
            self._close()
            self._prefix = prefix
        self._block[name.removeprefix(prefix)] = value.strip()

    def finish(self) -> None:
        """Say that there are no more lines."""
        self._close()

    def _close(self) -> None:
        if self._prefix == _INSPECTION and "root" in self._block and not self.inspection:
            self.inspection = self._block
        elif self._prefix == _GUESTCAPS and "block_bus" in self._block:
            self.guestcaps = self._block
        self._block, self._prefix = {}, ""


def read_properties(lines: Iterable[str]) -> PropertyReader:
    """Return the properties in a whole debugging output."""
    reader = PropertyReader()
    for line in lines:
        reader.feed(line)
    reader.finish()
    return reader


def to_guestcaps(values: Mapping[str, str], *, is_windows: bool) -> Guestcaps:
    """Return the guestcaps of ``gcaps_…`` lines.

    ``is_windows`` decides what the hardware clock shows where the program (2.2) does not say it.

    Raises:
        ValueError: there are none, or one has a value that is not known.
    """
    if "block_bus" not in values:
        raise ValueError("it did not tell which virtual hardware the guest has drivers for")
    known: dict[str, Any] = {"rtc_utc": not is_windows}
    for name, value in values.items():
        if name in Guestcaps.model_fields:
            known[name] = {"true": True, "false": False}.get(value, value)
    # 2.4 and newer tell the least version of the instruction set instead (x86-64-v2 is 2).
    if "default_cpu" not in values and values.get("arch_min_version", "0") not in ("0", "1"):
        known["default_cpu"] = False
    try:
        return Guestcaps.model_validate(known)
    except ValidationError as error:
        where = error.errors()[0]
        raise ValueError(
            f"gcaps_{'.'.join(map(str, where['loc']))} has an unknown value: {where['input']!r}"
        ) from error


def to_inspection(values: Mapping[str, str]) -> Inspection:
    """Return the inspection data of ``i_…`` lines or of the elements of ``-O``'s file."""
    known: dict[str, Any] = {}
    for name in Inspection.model_fields:
        value = values.get(name)
        if value is None or value == "":
            continue
        if name in ("major_version", "minor_version"):
            known[name] = int(value) if value.isdecimal() else 0
        elif name in ("osinfo", "package_format", "package_management") and value == "unknown":
            known[name] = None
        else:
            known[name] = value
    return Inspection(**known)


def to_firmware(value: str | None) -> Firmware:
    """Return the firmware of ``i_firmware = BIOS`` or ``UEFI [/dev/sda1]``, or of ``-O``'s file."""
    word = (value or "").split(maxsplit=1)[:1]
    found: dict[str, Firmware] = {"bios": "bios", "uefi": "uefi"}
    return found.get(word[0].lower(), "unknown") if word else "unknown"


def target_firmware(source: SourceGuest, found: Firmware) -> Firmware:
    """Return the target's firmware: the source's where it is known, else what inspection found."""
    return source.firmware if source.firmware != "unknown" else found
