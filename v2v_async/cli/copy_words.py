"""The command line of ``v2v-async copy`` and of nbdcopy, turned into options.

::

    argv ── read() ──> CopyWords ── pairs() options()     no file is opened or made here

nbdcopy's own options mean here what they mean there (nbdcopy(1) of libnbd 1.14 to 1.24). Sizes may
have a suffix, as from libnbd 1.24 on. Tried with nbdcopy 1.14: ``-C 0`` and ``-R 0`` are refused,
``-T 0`` chooses; ``-S`` wants 0 or a power of two from 512 on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from v2v_async.cli import values
from v2v_async.cli.copy_ends import Command, Pair, bracketed, pairs
from v2v_async.cli.getopt import Given, Option, parse
from v2v_async.errors import UsageError
from v2v_async.options import CopyOptions
from v2v_async.units import parse_size

T = TypeVar("T")

_MAX_REQUEST = 32 << 20  # more in one request is a server's right to refuse: NBD protocol
_MIN_REQUEST = 4096
_MIN_SPARSE = 512


def _takes(*names: str, metavar: str, help: str, group: str, **more: object) -> Option:
    return Option(names, metavar=metavar, help=help, group=group, argument="required", **more)  # type: ignore[arg-type]


NBDCOPY = (
    Option(("--allocated",), group="disk", help="make zeroes take room on the target too"),
    Option(("--destination-is-zero", "--target-is-zero"), group="disk",
           help="the target reads as zeroes: write none. Wrong data where that is not true"),
    Option(("--no-extents",), group="disk",
           help="read everything, whatever the source says about holes"),
    _takes("-S", "--sparse", metavar="N", group="disk",
           help="find zeroes in data in blocks of N bytes; 0: do not look. Default 4096"),
    Option(("--synchronous",), group="disk", help="one request at a time, in order"),
    _takes("-C", "--connections", metavar="N", group="speed",
           help="connections a disk, where the servers allow several"),
    _takes("-R", "--requests", metavar="N", group="speed",
           help="requests in flight on a connection"),
    _takes("-T", "--threads", metavar="N", group="speed", help="threads; 0: choose"),
    _takes("--request-size", metavar="N", group="speed",
           help="largest request: a power of two from 4K to 32M"),
    _takes("--queue-size", metavar="N", group="speed",
           help="bytes in flight on a connection"),
    Option(("--flush",), group="safety", help="done means on stable storage"),
    Option(("-p",), group="screen", help="a progress bar on stderr"),
    Option(("--progress",), metavar="FD", argument="optional", group="screen",
           help="the same; with FD, lines N/100 to that descriptor"),
    Option(("--blkhash",), metavar="ALGORITHM[/SIZE]", argument="optional", group="safety",
           help="print a digest of the disk"),
    _takes("--blkhash-file", metavar="FILE", group="safety", help="print digests there"),
    Option(("-v", "--verbose"), group="screen", help="debugging messages too"),
    Option(("-V", "--version"), help="show the version and stop"),
    Option(("--help",), help="show this help and stop"),
    Option(("--long-options",)),
    Option(("--short-options",)),
)  # fmt: skip
"""nbdcopy's options, all of them."""

_OURS = (
    _takes("--parallel", metavar="N", group="speed", help="disks at once; default: all"),
    _takes("--max-connections", metavar="N", group="speed",
           help="connections of all disks together"),
    _takes("--bandwidth", metavar="RATE", group="speed",
           help="over all disks: bits a second, or bytes as 50MB/s"),
    _takes("--bandwidth-file", metavar="FILE", group="speed", files="file",
           help="the same from a file, which may change while the copy runs"),
    _takes("--copier", metavar="NAME", group="speed",
           help="native (default), nbdcopy or qemu-img: what moves the bytes"),
    _takes("--retries", metavar="N", group="safety",
           help="tries again after a lost connection or a failed request; default 5"),
    _takes("--checkpoint", metavar="DIR", group="safety", files="directory",
           help="remember there what has landed; the same command again goes on from it"),
    Option(("--verify",), group="safety", help="read both sides again and compare"),
    Option(("--repair",), group="safety", help="copy again what --verify finds to differ"),
    Option(("--digest", "--blkhash"), metavar="ALGORITHM[/SIZE]", argument="optional",
           group="safety", help="print a digest of each disk, as nbdcopy --blkhash does: md5, "
           "sha1, sha256 (default) or sha512, over blocks of SIZE (default 64K)"),
    _takes("--digest-file", "--blkhash-file", metavar="FILE", group="safety", files="file",
           help="print digests there"),
    Option(("--no-flush",), group="safety", help="do not wait for stable storage"),
    Option(("-q", "--quiet"), help="only warnings and errors", group="screen"),
    Option(("--machine-readable",), metavar="FORMAT", argument="optional", group="screen",
           help="virt-v2v's messages for programs, to stdout, file:NAME, fd:N or stream:stderr"),
    _takes("--events", metavar="FILE|fd:N", group="screen", files="file",
           help="every event as a line of JSON"),
    Option(("--colours", "--colors", "--colour", "--color"), group="screen",
           help="colours even where there is no terminal"),
)  # fmt: skip
_REPLACED = ("--blkhash", "--blkhash-file")  # by our spellings, which take these names too
COPY = (*(o for o in NBDCOPY if o.name not in _REPLACED), *_OURS)
"""The options of ``v2v-async copy``."""


@dataclass(slots=True)
class CopyWords:
    """A command line taken apart."""

    options: dict[str, str | None] = field(default_factory=dict)
    words: list[str | Command] = field(default_factory=list)
    progress: int | Literal["bar"] | None = None
    answer: str | None = None  # --help, --version …: what stops everything else

    def has(self, name: str) -> bool:
        """Whether option ``name`` was given."""
        return name in self.options


_ANSWERS = ("--help", "-V", "--long-options", "--short-options")


def read(argv: Sequence[str], *, is_nbdcopy: bool) -> CopyWords:
    """Take ``argv`` apart; the last of a repeated option counts, as in nbdcopy.

    By the name nbdcopy, options are options between brackets too, unless ``--`` came first.

    Raises:
        UsageError: unknown option, bad argument, brackets that do not match.
    """
    made = CopyWords()
    commands: list[Command] = []
    if is_nbdcopy:
        _refuse_unknown_letters(argv)
    else:
        argv = _hide_commands(argv, commands)
    words: list[str] = []
    for item in parse(NBDCOPY if is_nbdcopy else COPY, argv):
        if not isinstance(item, Given):
            words.append(item.text)
            continue
        name = item.option.name
        made.options[name] = item.value
        if name in _ANSWERS:
            made.answer = name
            return made
        if name in ("-p", "--progress"):
            made.progress = "bar" if item.value is None else _descriptor(item.value)
    # No word of a command line holds a null character, so this is one that was hidden.
    made.words = (
        bracketed(words)
        if is_nbdcopy
        else [commands[int(w[1:])] if w.startswith("\0") else w for w in words]
    )
    return made


def _refuse_unknown_letters(argv: Sequence[str]) -> None:
    """Keep the parser, which takes ``-flush`` for ``--flush`` as virt-v2v, to nbdcopy's way."""
    letters = {letter for option in NBDCOPY for letter in option.letters}
    for word in argv:
        if word == "--":
            return
        if len(word) > 1 and word[0] == "-" and word[1] not in letters | {"-"}:
            raise UsageError(f"unknown option ‘{word[:2]}’", hint="see nbdcopy --help")


def _hide_commands(argv: Sequence[str], commands: list[Command]) -> list[str]:
    """Return ``argv`` with each command between brackets replaced by a word that hides it."""
    hidden = []
    for word in bracketed(argv):
        if isinstance(word, Command):
            hidden.append(f"\0{len(commands)}")
            commands.append(word)
        else:
            hidden.append(word)
    return hidden


def disks(words: CopyWords, *, is_nbdcopy: bool) -> tuple[Pair, ...]:
    """Return the endpoints, checked together with the options.

    Raises:
        UsageError, SourceError, TargetError
    """
    if is_nbdcopy and len(words.words) != 2:
        raise UsageError("one source and one target are needed", hint="see nbdcopy --help")
    found = pairs(words.words)
    if words.progress == 1 and writes_stdout(found):
        raise UsageError("--progress: stdout is the copy's target", hint="write --progress=2")
    for option in ("--verify", "--repair", "--checkpoint"):
        for end in (end for pair in found for end in pair):
            if words.has(option) and end.kind in ("stream", "null"):
                raise UsageError(
                    f"{option}: ‘{end}’ can't be read again",
                    hint=f"leave {option} out, or name a file, a device or an NBD server",
                )
    return found


def writes_stdout(found: Sequence[Pair]) -> bool:
    """Whether stdout is a target, so that nothing else may be written there."""
    return any(target.fd == 1 for _, target in found)


def options(words: CopyWords, *, is_nbdcopy: bool) -> CopyOptions:
    """Return how to copy.

    ``v2v-async copy`` flushes unless told not to; nbdcopy only when told to.

    Raises:
        UsageError: an argument is no number, or outside its limits.
    """
    if words.has("--flush") and words.has("--no-flush"):
        raise UsageError("--flush and --no-flush contradict each other", hint="keep one")
    queue = _size(words, "--queue-size")
    retries = _count(words, "--retries", least=0)
    return CopyOptions(
        parallel=_count(words, "--parallel"),
        max_connections=_count(words, "--max-connections"),
        threads=_count(words, "-T", least=0) or None,
        bandwidth=_given(words, "--bandwidth", values.rate),
        bandwidth_file=_given(words, "--bandwidth-file", values.rate_file),
        connections=_count(words, "-C"),
        requests=_count(words, "-R"),
        request_size=_power_of_two(words, "--request-size", _MIN_REQUEST, _MAX_REQUEST),
        queue_size=None if queue is None else max(queue, 1),
        sparse=_power_of_two(words, "-S", _MIN_SPARSE, None),
        allocated=words.has("--allocated"),
        target_is_zero=words.has("--destination-is-zero"),
        extents=not words.has("--no-extents"),
        flush=words.has("--flush") if is_nbdcopy else not words.has("--no-flush"),
        synchronous=words.has("--synchronous"),
        retries=CopyOptions().retries if retries is None else retries,
        keep_going=True,
        checkpoint=_directory(words.options.get("--checkpoint")),
        verify=words.has("--verify") or words.has("--repair"),
        repair=words.has("--repair"),
        digest=_digest(words),
        copier=_given(words, "--copier", values.copier) or "native",
    )


def _descriptor(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(
            f"--progress: ‘{text}’ names no file descriptor", hint="write for example --progress=3"
        )
    return int(text)


def _count(words: CopyWords, name: str, *, least: int = 1) -> int | None:
    text = words.options.get(name)
    return None if text is None else values.count(name, text, least)


def _bytes(text: str) -> int:
    """Return the bytes that ``text`` means; ``8s`` is sectors, which libnbd knows too."""
    if match := re.fullmatch(r"([0-9]{1,15})[sS]", text):
        return int(match[1]) * 512
    return parse_size(text.removeprefix("+"))


def _size(words: CopyWords, name: str) -> int | None:
    text = words.options.get(name)
    if text is None:
        return None
    try:
        return _bytes(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}", hint=f"write for example {name}=1M") from None


def _power_of_two(words: CopyWords, name: str, least: int, most: int | None) -> int | None:
    size = _size(words, name)
    if size is None or (size == 0 and name == "-S"):
        return size
    if size & (size - 1) or size < least or (most is not None and size > most):
        limit = f"from {least} to {most}" if most is not None else f"from {least} on, or 0"
        raise UsageError(
            f"{name}: ‘{words.options[name]}’ is not a power of two {limit}",
            hint=f"write for example {name} {max(least, 65536)}",
        )
    return size


def _directory(text: str | None) -> Path | None:
    if text is None:
        return None
    if not text or (Path(text).exists() and not Path(text).is_dir()):
        raise UsageError(f"--checkpoint: ‘{text}’ is no directory", hint="name a directory")
    return Path(text)


def _given(words: CopyWords, name: str, read: Callable[[str], T]) -> T | None:
    """Return what ``name`` was given, read; None where it was not."""
    text = words.options.get(name)
    return None if text is None else read(text)


def _digest(words: CopyWords) -> str | None:
    """Return ``ALGORITHM/SIZE`` as the engine reads it."""
    name = next((n for n in ("--digest", "--blkhash") if words.has(n)), None)
    if name is None:
        return None
    from v2v_async.copy.digest import parse_kind  # hashlib costs 4 ms

    try:
        return str(parse_kind(words.options[name]))
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", hint=error.hint) from None
