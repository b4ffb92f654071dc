"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
_SUFFIXES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB, "P": 1024**5}


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` means: ``512``, ``64K``, ``1.5G``, ``2GiB`` (powers of 1024).

    Raises:
        ValueError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([BKMGTP]?)(?:iB)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"‘{text}’ is not a size (write for example 512, 64K or 1.5G)")
    return int(float(match[1]) * _SUFFIXES[match[2].upper()])


def format_size(size: float) -> str:
    """Return ``size`` bytes in at most 9 characters: ``0 B``, ``1.5 GiB``, ``512 MiB``."""
    if size < KIB:
        return f"{size:.0f} B"
    for suffix in ("KiB", "MiB", "GiB", "TiB"):
        size /= KIB
        if size < 1000 or suffix == "TiB":
            break
    return f"{size:.1f} {suffix}" if size < 100 else f"{size:.0f} {suffix}"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` as ``0:07``, ``12:05`` or ``1:02:03``."""
    total = round(seconds)
    minutes, secs = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def drive_letters(position: int) -> str:
    """Return the letters of the disk at ``position`` (from 0): ``a`` … ``z``, ``aa``, ``ab`` …"""
    letters = ""
    position += 1
    while position > 0:
        position, letter = divmod(position - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters
