"""Keep passphrases and passwords off the command line of virt-v2v-in-place.

Everybody on the machine can read an argv. A secret goes to a file in the v2v directory (mode 0600)
that only lives as long as the conversion, and the option names that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from v2v_async.errors import UsageError


@dataclass(frozen=True, slots=True)
class SafeOptions:
    """``--key`` selectors and customisation options without a secret in them."""

    keys: list[str]
    customize: list[str]


@contextmanager
def secret_files(
    directory: Path, keys: Sequence[str], customize: Sequence[str]
) -> Iterator[SafeOptions]:
    """Put every secret into a file of ``directory`` for the duration of a block.

    Raises:
        UsageError: a selector is not one.
    """
    made: list[Path] = []

    def to_file(secret: str) -> Path:
        path = directory / f"secret-{len(made) + 1}"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        made.append(path)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)
        return path

    try:
        safe_keys = []
        for key in keys:
            identifier, kind, value = _split_key(key)
            if kind == "key":
                safe_keys.append(f"{identifier}:file:{to_file(value)}")
            else:
                safe_keys.append(key)
        safe_customize = list(customize)
        for position, word in enumerate(customize):
            name, equals, value = word.partition("=")
            if name not in ("--root-password", "--password"):
                continue
            at = position if equals else position + 1
            if not equals and at < len(customize):
                value = customize[at]
            match = re.fullmatch(
                r"(?P<head>(?:locked:|disabled:)?)password:(?P<secret>.*)"
                if name == "--root-password"
                else r"(?P<head>[^:]*:(?:locked:|disabled:)?)password:(?P<secret>.*)",
                value,
                re.DOTALL,
            )
            if match is not None:
                changed = f"{match['head']}file:{to_file(match['secret'])}"
                safe_customize[at] = f"{name}={changed}" if equals else changed
        yield SafeOptions(safe_keys, safe_customize)
    finally:
        for path in made:
            path.unlink(missing_ok=True)


def _split_key(key: str) -> tuple[str, str, str]:
    # The words in the middle hold no colons; a passphrase may.
    match = re.match(r"(?P<id>.+?):(?P<kind>key|file):(?P<value>.*)", key, re.DOTALL)
    if match is not None:
        return match["id"], match["kind"], match["value"]
    identifier, _, kind = key.rpartition(":")
    if identifier and kind == "clevis":
        return identifier, kind, ""
    raise UsageError(
        "--key has a selector that is not one",
        hint="write ID:key:PASSPHRASE, ID:file:FILENAME or ID:clevis",
    )
