"""Words of a copy's command line, sorted into endpoints as nbdcopy(1) does. Nothing is opened.

::

    -                 a stream; a file where stdin or stdout is a regular file or a block device
    [ CMD ARGS … ]    a server of our own; the brackets are words by themselves
    nbd…://…          an NBD URI
    null:             only as a target
    anything else     a path: a file or block device, else a stream
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from v2v_async.copy.endpoint import Endpoint
from v2v_async.errors import SourceError, TargetError, UsageError
from v2v_async.redact import redact

Pair = tuple[Endpoint, Endpoint]
Side = Literal["source", "target"]

# As libnbd knows them: nbd_connect_uri(3), "URI scheme". It compares them letter by letter.
_NBD = re.compile(r"nbds?(\+(unix|vsock|ssh))?:")
_OTHER_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class Command:
    """``[ CMD ARGS … ]``."""

    argv: tuple[str, ...]


def bracketed(words: Sequence[str]) -> list[str | Command]:
    """Return ``words`` with each ``[ CMD ARGS … ]`` made one.

    A command may hold ``[`` as an argument, never ``]``.

    Raises:
        UsageError: a bracket has no partner, or nothing is between the two.
    """
    made: list[str | Command] = []
    command: list[str] | None = None
    for word in words:
        if command is None:
            if word == "]":
                raise UsageError("‘]’ without ‘[’ before it", hint="write ./] for a file")
            if word == "[":
                command = []
            else:
                made.append(word)
        elif word == "]":
            if not command:
                raise UsageError("no command between ‘[’ and ‘]’", hint="write [ CMD ARGS … ]")
            made.append(Command(tuple(command)))
            command = None
        else:
            command.append(word)
    if command is not None:
        raise UsageError(
            "‘[’ without ‘]’ after the command", hint="write ‘]’ as a word by itself: [ CMD ARGS ]"
        )
    return made


_UNPAIRED = {0: "nothing to copy", 1: "no target named"}


def pairs(words: Sequence[str | Command]) -> tuple[Pair, ...]:
    """Return the pairs of endpoints that ``words`` name, all checked before anything is touched.

    Raises:
        UsageError: a side is missing, or two names mean the same disk where one is written.
        SourceError, TargetError: there is no such file, or it can't be read or written.
    """
    if not words or len(words) % 2:
        raise UsageError(
            _UNPAIRED.get(len(words), "sources and targets do not pair up"),
            hint="name a source and its target for each disk: SOURCE TARGET [SOURCE TARGET …]",
        )
    found = tuple(
        (_endpoint(words[n], "source"), _endpoint(words[n + 1], "target"))
        for n in range(0, len(words), 2)
    )
    _refuse_shared(found)
    return found


def _endpoint(word: str | Command, side: Side) -> Endpoint:
    if isinstance(word, Command):
        return Endpoint("command", argv=word.argv)
    if word == "":
        raise UsageError(f"the {side}'s name is empty", hint="is a shell variable unset?")
    if word == "-":
        return _standard(side)
    if word == "null:":
        if side == "source":
            raise UsageError(
                "null: can't be a source", hint="[ nbdkit null SIZE ] is a disk of zeroes"
            )
        return Endpoint("null")
    if _NBD.match(word):
        if "://" not in word:
            raise UsageError(
                f"‘{redact(word)}’ is not an NBD URI",
                hint="write nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH",
            )
        return Endpoint("nbd", word)
    return _path(word, side)


def _standard(side: Side) -> Endpoint:
    """Return the endpoint for ``-``."""
    fd = 0 if side == "source" else 1
    name = "stdin" if side == "source" else "stdout"
    try:
        os.fstat(fd)
    except OSError as error:
        raise _error(side, f"{name}: {error.strerror}", f"give the program a {name}") from None
    if side == "target" and os.isatty(fd):
        raise TargetError(
            "refusing to write to a terminal", hint="name a file, or pipe it into a program"
        )
    from v2v_async.copy.open_file import local_kind  # it brings in libnbd

    return Endpoint(local_kind(fd), fd=fd)


def _path(word: str, side: Side) -> Endpoint:
    try:
        mode: int | None = os.stat(word).st_mode
    except FileNotFoundError as error:
        if _OTHER_SCHEME.match(word):
            raise _other_scheme(word) from None
        if side == "source":
            raise _error(side, f"{word}: {error.strerror}", _MISSING[side]) from None
        mode = None
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _error(side, f"{word}: {reason}", _MISSING[side]) from None
    if mode is None:
        parent = _parent(word)
        if word.endswith("/"):
            raise _error(side, f"{word}: Is a directory", "name a file in it")
        if not parent.is_dir():
            raise _error(side, f"{word}: No such file or directory", f"make ‘{parent}’ first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise _error(side, f"{word}: Permission denied", f"nothing can be made in ‘{parent}’")
        return Endpoint("file", word)
    if stat.S_ISDIR(mode):
        what = "one of the files in it" if side == "source" else "a file in it"
        raise _error(side, f"{word}: Is a directory", f"name {what}")
    if stat.S_ISSOCK(mode):
        raise UsageError(
            f"{word}: is a socket", hint=f"for an NBD server write ‘nbd+unix:///?socket={word}’"
        )
    if not os.access(word, os.R_OK if side == "source" else os.W_OK):
        raise _error(side, f"{word}: Permission denied", f"let this user use the {side}")
    is_file = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
    return Endpoint("file" if is_file else "stream", word)


_MISSING: dict[Side, str] = {
    "source": "name a file that exists",
    "target": "name a file in a directory that exists",
}


def _parent(word: str) -> Path:
    return Path(os.path.realpath(word)).parent


def _other_scheme(word: str) -> UsageError:
    scheme = word.partition(":")[0].lower()
    if _NBD.match(f"{scheme}:"):
        hint = f"write the scheme in small letters: {scheme}://…"
    elif scheme in ("http", "https", "ftp", "ftps", "sftp", "scp"):
        hint = "let nbdkit serve it: [ nbdkit curl URL ]"
    elif scheme == "ssh":
        hint = "let nbdkit serve it: [ nbdkit ssh host=HOST PATH ]"
    else:
        hint = "let an NBD server serve it: [ nbdkit PLUGIN … ] or [ qemu-nbd -f FORMAT … ]"
    return UsageError(f"‘{redact(word)}’ is neither a file nor an NBD URI", hint=hint)


def _error(side: Side, message: str, hint: str) -> SourceError | TargetError:
    return (SourceError if side == "source" else TargetError)(message, hint=hint)


def _refuse_shared(found: Sequence[Pair]) -> None:
    """Refuse whatever is written and used a second time: it would be destroyed while it is read."""
    if sum(source.fd == 0 for source, _ in found) > 1:
        raise UsageError("two disks can't both be read from stdin", hint="keep one ‘-’")
    targets: dict[object, Endpoint] = {}
    for _, target in found:
        identity = _identity(target)
        if identity is not None and identity in targets:
            raise UsageError(
                f"{_named(targets[identity], target)} the target of two disks",
                hint="name a target for each disk",
            )
        targets[identity] = target
    for source, _ in found:
        identity = _identity(source)
        if identity is not None and identity in targets:
            raise UsageError(
                f"{_named(source, targets[identity])} both source and target",
                hint="name another target; nothing was touched",
            )


def _named(first: Endpoint, second: Endpoint) -> str:
    if str(first) == str(second):
        return f"‘{first}’ is"
    return f"‘{first}’ is the same as ‘{second}’, and is"


def _identity(endpoint: Endpoint) -> object:
    """Return what two names of one disk have in common, None where sharing it harms nobody."""
    if endpoint.kind == "nbd":
        return _nbd_identity(endpoint.address)
    if endpoint.kind not in ("file", "stream"):
        return None
    try:
        found = os.stat(endpoint.fd if endpoint.fd is not None else endpoint.address)
    except OSError:  # a target that has to be made
        place = Path(os.path.realpath(endpoint.address))
        parent = os.stat(place.parent)
        return parent.st_dev, parent.st_ino, place.name
    if stat.S_ISBLK(found.st_mode):
        return "device", found.st_rdev
    if stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode):
        return found.st_dev, found.st_ino
    return None  # /dev/null on both sides harms nobody; one socket may be both stdin and stdout


def _nbd_identity(uri: str) -> object:
    from urllib.parse import parse_qs, urlsplit

    try:
        split = urlsplit(uri)
    except ValueError:  # a bracket of an IPv6 address is missing: libnbd says more about it
        return uri
    export = split.path.lstrip("/")
    for path in parse_qs(split.query).get("socket", []):
        try:
            found = os.stat(path)
        except OSError:
            return "socket", path, export
        return "socket", found.st_dev, found.st_ino, export
    scheme = split.scheme.replace("nbds", "nbd", 1)
    return scheme, split.netloc.rpartition("@")[2].lower(), export
