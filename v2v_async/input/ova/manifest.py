"""Manifests (``.mf``): the checksums of an OVA's files.

A line is ``SHA256(disk1.vmdk)= 3b5d…``; names are relative to the manifest's folder.
Source: DSP0243, 4.1 (SHA1 and SHA256); newer VMware writes SHA512 too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from v2v_async.errors import SourceError
from v2v_async.units import MIB

MAX_SIZE = 4 * MIB
"""Bytes: 30,000 files."""

_LINE = re.compile(r"(SHA(?:1|224|256|384|512)) ?\((.+)\) ?= ?([0-9a-fA-F]+)", re.IGNORECASE)
_DIGITS = {"sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a file's should be. ``algorithm`` as hashlib names it, ``digest`` in lower case."""

    name: str
    algorithm: str
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All lines, and what is wrong with those that could not be read."""

    checksums: list[Checksum] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_manifest(content: bytes, what: str) -> Manifest:
    """Read a manifest; ``what`` names it in messages. A line of another kind is a warning.

    Raises:
        SourceError: it is too long, or a checksum can't be one of its algorithm.
    """
    if len(content) > MAX_SIZE:
        raise SourceError(f"{what} is too long ({len(content)} bytes; at most {MAX_SIZE} are read)")
    manifest = Manifest()
    strange = 0
    for raw in content.split(b"\n"):
        line = raw.decode("utf-8", "surrogateescape").strip(" \t\r\ufeff")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            strange += 1
            if strange == 1:
                manifest.warnings.append(
                    f"{what}: a line that is not understood is ignored: ‘{line[:100]}’"
                )
            continue
        algorithm, digest = match[1].lower(), match[3].lower()
        if len(digest) != _DIGITS[algorithm]:
            raise SourceError(
                f"{what}: the checksum of ‘{match[2][:200]}’ has {len(digest)} digits; "
                f"{match[1]} has {_DIGITS[algorithm]}"
            )
        manifest.checksums.append(Checksum(match[2].strip(), algorithm, digest))
    if strange > 1:
        manifest.warnings.append(f"{what}: {strange - 1} more lines are not understood")
    return manifest
