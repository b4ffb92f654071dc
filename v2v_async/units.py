"""Sizes and durations as people write and read them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

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


# A plain number is bits, as in nbdkit-rate-filter(1), whose suffixes are powers of 1024 (tried with
# nbdkit 1.32: 8M is 8388608). With a unit it says itself what it is: ‘b’ bits, ‘B’ bytes, and
# ‘M’ 1000² but ‘Mi’ 1024², as networks and disks are sold.
_BITS = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGTP]?)", re.IGNORECASE)
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kKmMgGtTpP])(i?))?(bits?|b|bytes?|B)(?:/s|ps)")


def parse_rate(text: str) -> int:
    """Return the bytes a second that ``text`` means.

    ``400M`` is bits a second in powers of 1024, as virt-v2v's ``--bandwidth``; ``400Mbit/s`` and
    ``50MB/s`` are powers of 1000, ``50MiB/s`` of 1024.

    Raises:
        ValueError: it is not a rate, or it is zero, at which nothing would ever end.
    """
    text = text.strip()
    if match := _BITS.fullmatch(text):
        bits = Fraction(match[1]) * _SUFFIXES[match[2].upper()]
    elif match := _RATE.fullmatch(text):
        power = " KMGTP".index((match[2] or " ").upper())
        bits = Fraction(match[1]) * (1024 if match[3] else 1000) ** power
        bits *= 8 if match[4][0] == "B" or match[4].startswith("byte") else 1
    else:
        raise ValueError(
            f"‘{text}’ is not a rate (write for example 400M or 400Mbit/s for bits a second, "
            f"50MB/s or 50MiB/s for bytes)"
        )
    if not bits:
        raise ValueError("a rate of 0 would never end (leave it out for no limit)")
    return math.ceil(bits / 8)


def format_rate(rate: float | None) -> str:
    """Return ``rate`` bytes a second as ``47.7 MiB/s``, ``None`` as ``unlimited``."""
    return "unlimited" if rate is None else f"{format_size(rate)}/s"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` as ``0:07``, ``12:05`` or ``1:02:03``."""
    total = round(seconds)
    minutes, secs = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def format_lapse(seconds: float) -> str:
    """Return ``seconds`` as ``0.4 s`` or, from ten on, as :func:`format_duration` does."""
    return f"{seconds:.1f} s" if seconds < 9.95 else format_duration(seconds)


_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_duration(text: str) -> float:
    """Return the seconds that ``text`` means: ``30s``, ``10m``, ``1h30m``, ``2d``.

    Raises:
        ValueError: it is not a duration.
    """
    match = _DURATION.fullmatch(text.replace(" ", ""))
    if match is None or not any(match.groups()):
        raise ValueError(f"‘{text}’ is not a duration (write for example 30s, 10m or 1h30m)")
    days, hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def drive_letters(position: int) -> str:
    """Return the letters of the disk at ``position`` (from 0): ``a`` … ``z``, ``aa``, ``ab`` …"""
    letters = ""
    position += 1
    while position > 0:
        position, letter = divmod(position - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters
