"""The syntax of VMX files: ``key = "value"`` lines. Pure; what the keys mean is elsewhere.

There is no specification. Keys are compared without regard to case and the first of two counts;
dots divide them into namespaces, and ``NAMESPACE.present = "FALSE"`` takes away all that is in one.
A character that a value can't hold is written ``|XX``, its byte in hexadecimal.
Source: libvirt.org/drvesx.html, and what virt-v2v 2.2 makes of such files (tests compare).
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from v2v_async.errors import SourceError

MAX_SIZE = 1024 * 1024
"""Bytes; real files have some kilobytes, with many snapshots some tens of them."""

_LINE = re.compile(rb'\s*([^\s="]+)\s*=\s*"(.*)"\s*')
_ESCAPE = re.compile(rb"\|([0-9A-Fa-f]{2})")
_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,20})\s*")
_NOT_VMX = (
    (b"# Disk DescriptorFile", "a VMDK descriptor: it tells of a disk"),
    (b"KDMV", "a VMDK disk image"),
    (b"VMDK", "a VMDK disk image"),
    (b"COWD", "a VMDK disk image"),
    (b"<?xml", "an XML file"),
    (b"PK\x03\x04", "a zip archive"),
)
# Each line that is not understood is worth a warning, but not thousands.
_MOST_WARNINGS = 5


@dataclass(frozen=True, slots=True)
class VmxFile:
    """What a VMX file says. ``values``: keys in small letters, of what is present only."""

    values: dict[str, str]
    what: str
    warnings: list[str] = field(default_factory=list)

    def get(self, key: str) -> str | None:
        """Return a value, None where there is none."""
        return self.values.get(key.lower())

    def number(self, key: str) -> int | None:
        """Return a whole number, None where there is none.

        Raises:
            SourceError: it is something else.
        """
        value = self.get(key)
        if value is None:
            return None
        match = _NUMBER.fullmatch(value)
        if match is None:
            raise SourceError(
                f'{self.what}: ‘{key} = "{value[:80]}"’ is not a whole number',
                hint="correct it in a copy of the file",
            )
        return int(match[1])

    def is_true(self, key: str) -> bool:
        """Whether a value is TRUE, however it is written."""
        return (self.get(key) or "").lower() == "true"

    def namespaces(self, pattern: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the first parts of keys that match, with the numbers in them, in their order."""
        expression = re.compile(pattern)
        found = {}
        for key in self.values:
            space, dot, _ = key.partition(".")
            match = expression.fullmatch(space) if dot else None
            if match is not None:
                found[space] = tuple(int(number) for number in match.groups())
        return sorted(found.items(), key=lambda item: item[1])


def parse_vmx(content: bytes, what: str) -> VmxFile:
    """Read a VMX file; ``what`` names it in messages.

    Raises:
        SourceError: it is something else, or too large.
    """
    if len(content) > MAX_SIZE:
        raise SourceError(
            f"{what} has more than {MAX_SIZE} bytes: it can't be a VMX file",
            hint="name the file that ends in .vmx, not a disk",
        )
    for magic, kind in _NOT_VMX:
        if content.startswith(magic):
            raise SourceError(
                f"{what} is {kind}, not a VMX file",
                hint="name the file that ends in .vmx; a disk alone is read with -i disk",
            )
    if b"\0" in content:
        raise SourceError(f"{what} is not text, so it can't be a VMX file")
    raw: dict[bytes, bytes] = {}
    warnings: list[str] = []
    ignored = 0
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        match = _LINE.fullmatch(line)
        key = b"" if match is None else match[1].lower()
        if match is None:
            why = f'line {number} is not KEY = "VALUE" and is ignored'
        elif key in raw:
            why = f"line {number}: ‘{key.decode(errors='replace')}’ is there already; ignored"
        else:
            raw[key] = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), match[2])
            continue
        ignored += 1
        if ignored <= _MOST_WARNINGS:
            warnings.append(f"{what}: {why}")
    if ignored > _MOST_WARNINGS:
        warnings.append(f"{what}: {ignored - _MOST_WARNINGS} more lines are ignored")
    if not raw:
        raise SourceError(f'{what} has no line of the form KEY = "VALUE": it is not a VMX file')
    encoding = _encoding(raw, what, warnings)
    values = {key.decode("ascii", "replace"): value.decode(encoding) for key, value in raw.items()}
    return VmxFile(_present(values), what, warnings)


def _encoding(raw: dict[bytes, bytes], what: str, warnings: list[str]) -> str:
    """Return an encoding that all values can be read in: the file's own where that is right."""
    told = raw.get(b".encoding", b"UTF-8").decode(errors="replace")
    for name in (told, "utf-8"):
        try:
            # Only of text: "zip" and the like are codecs too.
            encoding = codecs.lookup(name).name if "\0" not in name else "?"
            for value in raw.values():
                # Some codecs make lone surrogates, which are no text for anybody else.
                value.decode(encoding).encode()
        except (LookupError, UnicodeError, ValueError):
            continue
        if name is not told:
            warnings.append(f"{what}: it is not in the encoding ‘{told}’, but in UTF-8")
        return encoding
    warnings.append(f"{what}: its encoding is not known (‘{told}’ is wrong); Latin-1 is assumed")
    return "latin-1"


def _present(values: dict[str, str]) -> dict[str, str]:
    """Leave out what is in a namespace that is not present."""
    absent = {
        key.removesuffix(".present")
        for key, value in values.items()
        if key.endswith(".present") and value.lower() == "false"
    }
    return {key: value for key, value in values.items() if not _is_within(key, absent)}


def _is_within(key: str, spaces: set[str]) -> bool:
    at = key.find(".", 1)
    while at != -1:
        if key[:at] in spaces:
            return True
        at = key.find(".", at + 1)
    return False
