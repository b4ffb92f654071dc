"""Arguments of options, checked as virt-v2v checks them. No message here holds a passphrase."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from v2v_async.errors import UsageError
from v2v_async.options import Copier, MacMapping, Mapping, Overlap, OverlapOptions
from v2v_async.units import parse_rate, parse_size

_MAC = re.compile(r"((?:[0-9a-f]{2}:){5}[0-9a-f]{2}):(network|bridge|ip):(.*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stream for programs goes: a file, an open descriptor, stdout or stderr."""

    kind: Literal["file", "fd", "stdout", "stderr"]
    path: Path | None = None
    fd: int | None = None


def _descriptor(option: str, text: str) -> Target:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{option}: ‘fd:{text}’ names no file descriptor", hint="write fd:3")
    return Target("fd", fd=int(text))


def machine_readable_target(text: str | None) -> Target:
    """Return where ``--machine-readable[=TEXT]`` goes: stdout unless it says otherwise."""
    if text is None:
        return Target("stdout")
    kind, _, rest = text.partition(":")
    if kind == "file" and rest:
        return Target("file", path=Path(rest))
    if kind == "fd":
        return _descriptor("--machine-readable", rest)
    if kind == "stream" and rest in ("stdout", "stderr"):
        return Target("stdout" if rest == "stdout" else "stderr")
    raise UsageError(
        f"--machine-readable: ‘{text}’ is not a target",
        hint="write file:NAME, fd:N, stream:stdout or stream:stderr",
    )


def events_target(text: str) -> Target:
    """Return where ``--events=TEXT`` goes."""
    if not text:
        raise UsageError("--events: no file named", hint="write --events=FILE or --events=fd:N")
    if text.startswith("fd:"):
        return _descriptor("--events", text[3:])
    return Target("file", path=Path(text))


def mapping(option: str, text: str, known: tuple[Mapping, ...]) -> Mapping:
    """Return what ``-n`` or ``-b TEXT`` maps; the first colon separates.

    As in virt-v2v, ``OUT:`` and ``:OUT`` are ``OUT``, the default.

    Raises:
        UsageError: empty, or it maps again what one of ``known`` maps.
    """
    source, _, out = text.partition(":")
    if not source and not out:
        raise UsageError(f"{option}: nothing named", hint=f"write {option} IN:OUT or {option} OUT")
    made: Mapping = (source, out) if source and out else (None, source or out)
    if any(made[0] == other[0] for other in known):
        what = "the default" if made[0] is None else f"‘{made[0]}’"
        raise UsageError(f"{option} maps {what} twice", hint=f"keep one {option} for {what}")
    return made


def mac(text: str, known: tuple[MacMapping, ...]) -> MacMapping:
    """Return what ``--mac TEXT`` says about one NIC."""
    match = _MAC.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--mac: cannot understand ‘{text}’",
            hint="write for example --mac 52:54:00:aa:bb:cc:network:default",
        )
    kind = match[2].lower()
    if match[2] != kind:  # virt-v2v wants these words in lower case
        raise UsageError(f"--mac: ‘{match[2]}’ is no kind", hint=f"write {kind}")
    made = MacMapping(match[1].lower(), kind, match[3])  # type: ignore[arg-type]
    if made.kind == "ip":
        _check_static_ip(made.out)
    elif not made.out:
        raise UsageError(f"--mac: ‘{text}’ names no {kind}", hint=f"write {made.mac}:{kind}:NAME")
    elif any(o.mac == made.mac and o.kind != "ip" for o in known):
        raise UsageError(f"--mac maps {made.mac} twice", hint="keep one --mac for each NIC")
    return made


def _check_static_ip(text: str) -> None:
    """Check ``ADDRESS[,GATEWAY[,LENGTH[,DNS…]]]``."""
    fields = text.split(",")
    named = dict(zip(("address", "gateway", "length"), fields, strict=False))
    named |= {f"name server {n}": value for n, value in enumerate(fields[3:], 1)}
    for name, value in named.items():
        if name == "length":
            if not (value.isascii() and value.isdigit() and int(value) <= 128):
                raise UsageError(
                    f"--mac …:ip: ‘{value}’ is not a prefix length", hint="write for example 24"
                )
            continue
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise UsageError(
                f"--mac …:ip: {name} ‘{value}’ is not an IP address",
                hint="write ADDRESS[,GATEWAY[,LENGTH[,DNS…]]]",
            ) from None


def key(text: str) -> str:
    """Return ``text`` when it is a selector that virt-v2v accepts. Never quotes it."""
    device, _, rest = text.partition(":")
    kind, _, value = rest.partition(":")
    hint = "write ID:key:PASSPHRASE, ID:file:FILE or ID:clevis; ID is a device, a UUID or ‘all’"
    if kind not in ("key", "file", "clevis"):
        raise UsageError("--key: the selector has no known type", hint=hint)
    if kind == "clevis" and ":" in rest:
        raise UsageError("--key: ID:clevis takes nothing more", hint=hint)
    if kind in ("key", "file") and (not value or ":" in value):
        raise UsageError(
            f"--key: ID:{kind}: is followed by nothing, or by a text with a colon",
            hint=hint + ". A passphrase with a colon must be in a file",
        )
    if not device and kind != "key":
        raise UsageError("--key: no device named", hint=hint)
    return text


def root(text: str) -> str:
    """Return ``text`` when ``--root`` accepts it."""
    if text in ("ask", "single", "first") or text.startswith("/dev/"):
        return text
    raise UsageError(
        f"--root: ‘{text}’ is no choice", hint="write ask, single, first or a device as /dev/sda2"
    )


_MAX_COUNT = 1_000_000  # of disks, connections, requests: more is a slip of the keyboard


def count(option: str, text: str, least: int = 1) -> int:
    """Return the number that ``option TEXT`` means."""
    # nbdcopy 1.14 also takes -1 and 4x for numbers; here a slip is refused.
    if not re.fullmatch(r"\s*\+?[0-9]{1,12}", text) or not least <= int(text) <= _MAX_COUNT:
        raise UsageError(
            f"{option}: ‘{text}’ is not a number from {least} to {_MAX_COUNT}",
            hint=f"write for example {option} {max(least, 4)}",
        )
    return int(text)


def rate(text: str) -> int:
    """Return the bytes a second that ``--bandwidth TEXT`` means."""
    try:
        return parse_rate(text)
    except ValueError as error:
        raise UsageError(f"--bandwidth: {error}", hint="write for example 50MB/s") from None


def rate_file(text: str) -> Path:
    """Return the file of ``--bandwidth-file TEXT``; it may be missing now, and come later."""
    if not text or Path(text).is_dir():
        raise UsageError(f"--bandwidth-file: ‘{text}’ is no file", hint="name a file")
    return Path(text)


def copier(text: str) -> Copier:
    """Return the program that ``--copier TEXT`` names."""
    for name in get_args(Copier):
        if text == name:
            return name  # type: ignore[no-any-return]
    raise UsageError(f"--copier: unknown ‘{text}’", hint="write native, nbdcopy or qemu-img")


def overlap(text: str) -> Overlap:
    """Return what ``--overlap TEXT`` says."""
    for name in get_args(Overlap):
        if text == name:
            return name  # type: ignore[no-any-return]
    raise UsageError(f"--overlap: unknown ‘{text}’", hint="write auto, on or off")


def waste(text: str) -> OverlapOptions:
    """Return the options with the limit that ``--overlap-waste TEXT`` is: bytes, or ``N%``."""
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?%", text) and float(text[:-1]) <= 100:
        return OverlapOptions(waste_percent=float(text[:-1]))
    try:
        return OverlapOptions(waste=parse_size(text))
    except ValueError:
        raise UsageError(
            f"--overlap-waste: ‘{text}’ is neither a size nor a part of the disks",
            hint="write for example 500M or 20%",
        ) from None


def option_pair(text: str) -> tuple[str, str | None]:
    """Return ``NAME`` or ``NAME=VALUE`` of -io and -oo as a pair; a value may hold ``=``."""
    name, equals, value = text.partition("=")
    return name, value if equals else None
