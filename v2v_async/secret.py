"""Passwords: in memory, or in a file of mode 0600 that goes away; never in text that is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from v2v_async.errors import UsageError

VARIABLES = frozenset(
    ("OS_PASSWORD", "OS_TOKEN", "OS_PASSCODE", "OS_APPLICATION_CREDENTIAL_SECRET")
)
"""Variables of our environment that hold secrets: how one logs in to OpenStack, by custom."""

# A password, not a file named by mistake.
_LONGEST = 64 * 1024


class Secret:
    """A password. Only :meth:`reveal` gives it; repr, str and pickles of its holder do not."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def read(cls, path: Path, option: str) -> Secret:
        """Read it from a file, without the newline at its end; ``option`` named the file.

        Raises:
            UsageError: the file can't be read or holds no password.
        """
        try:
            with path.open("rb") as file:
                content = file.read(_LONGEST + 1)
        except OSError as error:
            raise UsageError(
                f"{option} ‘{path}’: {error.strerror}",
                hint="name a file that holds the password on its only line",
            ) from error
        try:
            value = content.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"{option} ‘{path}’ is not text") from error
        if not value or len(content) > _LONGEST or "\n" in value or "\0" in value:
            raise UsageError(
                f"{option} ‘{path}’ does not hold a password on its only line",
                hint="write the password, and nothing else, into the file",
            )
        return cls(value)

    def reveal(self) -> str:
        """Return the password itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Secret is not pickled")


@contextmanager
def secret_file(directory: Path, secret: Secret, name: str = "secret") -> Iterator[Path]:
    """Have a file of mode 0600 in ``directory`` that holds ``secret``; it goes with the block."""
    path = directory / f".{name}"
    path.unlink(missing_ok=True)  # of a run that was killed
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret.reveal() + "\n")
        yield path
    finally:
        path.unlink(missing_ok=True)
