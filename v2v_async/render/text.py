"""Words for events, and text from guests and servers made harmless for a terminal."""

from __future__ import annotations

import unicodedata

from v2v_async.events import Bytes, Event
from v2v_async.units import format_duration, format_size

STARTS = {
    "input": "Reading the source's disks and hardware",
    "inspect": "Looking into the guest",
    "convert": "Converting the guest",
    "output": "Making the target disks",
    "copy": "Copying the disks",
    "shutdown": "Waiting until the guest is off",
    "land": "Writing what the conversion changed to the disks",
    "finalize": "Describing the target guest",
    "cleanup": "Cleaning up",
}
"""What a person reads when a step starts."""

# Cc: escape sequences, \r and bells. Cf: bidirectional overrides that show a text backwards, and
# invisible characters. Cs: lone surrogates of undecodable file names, which can't be encoded.
# Zl, Zp: line and paragraph separators. Tabs become spaces: a tab's width is the terminal's.
_HARMFUL = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def clean(text: str) -> str:
    """Return ``text`` as one line that can't move a cursor, set a colour or hide anything."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if unicodedata.category(character) not in _HARMFUL
        else (" " if character in "\t\n\r\u2028\u2029" else "\N{REPLACEMENT CHARACTER}")
        for character in text
    )


def clean_lines(text: str) -> list[str]:
    """Return the lines of ``text``, each cleaned; empty ones at the end are left out."""
    return [clean(line) for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def place(event: Event, *, with_guest: bool) -> str:
    """Return where ``event`` belongs: ``guest g, copy, disk 2``, as far as it says."""
    parts = []
    if with_guest and event.guest is not None:
        parts.append(clean(event.guest))
    if event.step is not None:
        parts.append(clean(event.step))
    if event.disk is not None:
        parts.append(f"disk {event.disk}")
    return ", ".join(parts)


def lasted(seconds: float) -> str:
    """Return how long something took: tenths where minutes would say ``0:00``."""
    return f"{seconds:.1f} s" if seconds < 9.95 else format_duration(seconds)


def moved(b: Bytes, duration_s: float | None) -> str:
    """Return what became of a disk's bytes: ``1.8 GiB copied, 30 GiB zero, in 0:07 (…/s)``."""
    text = f"{format_size(b.copied)} copied"
    if b.zero + b.skipped:
        text += f", {format_size(b.zero + b.skipped)} zero"
    if b.resumed:
        text += f", {format_size(b.resumed)} there already"
    if b.retried:
        text += f", {format_size(b.retried)} copied again"
    if b.wasted:
        text += f", {format_size(b.wasted)} copied in vain"
    if duration_s is not None:
        text += f", in {lasted(duration_s)}"
        if duration_s >= 0.1 and b.copied:
            text += f" ({format_size(b.copied / duration_s)}/s)"
    return text
