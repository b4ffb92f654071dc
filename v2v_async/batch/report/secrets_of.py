"""The secrets that a guest's plan leads to, so that they can be masked where they turn up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from v2v_async.batch.plan.model import GuestPlan
from v2v_async.batch.report.redaction import is_secret_name
from v2v_async.secret import VARIABLES

_LONGEST = 64 << 10  # as Secret.read has it: a password, not a file named by mistake


def secrets_of(guest: GuestPlan) -> set[str]:
    """Return passwords and keys from files, options, URIs and the environment. Blocks."""
    return {each for each in _all(guest) if each.strip()}


def _all(guest: GuestPlan) -> Iterator[str]:
    for file in (guest.input.password_file, guest.output.password_file):
        if file is not None:
            yield from _content(file)
    words = iter(guest.options)
    selectors = list(guest.convert.keys)
    for word in words:
        option, _, value = word.partition("=")
        if option.lstrip("-") == "key":
            selectors.append(value or next(words, ""))
        elif option in ("-ip", "-op", "--password-file"):
            yield from _content(value or next(words, ""))
        elif option.startswith("-") and is_secret_name(option):
            yield from _selected(value or next(words, ""))
    for selector in selectors:
        _, kind, rest = _three(selector)
        if kind == "key":
            yield rest
        elif kind == "file":
            yield from _content(rest)
    for options in (guest.input.options, guest.output.options):
        for name, setting in options.items():
            if isinstance(setting, str) and is_secret_name(name):
                yield setting
    sources = guest.input.source
    for address in (
        guest.input.connection,
        guest.output.connection,
        *([sources] if isinstance(sources, str) else sources),
    ):
        yield from _password(address or "")
    for name in sorted(VARIABLES):
        yield os.environ.get(name, "")


def _content(file: str) -> Iterator[str]:
    """Yield a file's text, and its first line."""
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_LONGEST + 1)
    except (OSError, ValueError):  # a name with a NUL in it
        return
    if len(content) <= _LONGEST:
        text = content.decode(errors="replace").strip("\r\n")
        yield text
        yield text.partition("\n")[0].rstrip("\r")


def _selected(selector: str) -> Iterator[str]:
    """Yield the password in virt-customize's selector: ``[USER:]password:SECRET``."""
    head, mark, secret = selector.partition("password:")
    if mark:
        yield secret
    elif ":" not in head:
        yield head


def _three(selector: str) -> tuple[str, str, str]:
    """Return the parts of a ``--key`` selector, whose ID may have colons in it."""
    for kind in ("key", "file"):
        name, mark, rest = selector.partition(f":{kind}:")
        if mark:
            return name, kind, rest
    return selector, "", ""


def _password(address: str) -> Iterator[str]:
    """Yield the password of a URI, as it is written and as it is meant."""
    try:
        password = urlsplit(address).password if "://" in address else None
    except ValueError:
        return
    if password:
        yield password
        yield unquote(password)
