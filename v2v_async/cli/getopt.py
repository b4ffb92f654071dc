"""GNU ``getopt_long_only``, which virt-v2v uses, over a table of options.

argparse can't stand in for it: it refuses ``--root -V``, options between positional arguments
and ``--os`` for ``-os``, and accepts abbreviations that getopt calls ambiguous. So the table
below is parsed here, and only its help and completion are argparse's (:mod:`.table`).

::

    "-os", "--machine-readable"  long names; one dash and two are the same to getopt
    "-b", "-V"                   short names: one letter
    -oDIR, -vx                   short option with its argument, short options together
    -os=DIR, --os DIR, --mach    long name, "=" or the next word, unambiguous beginning
    --                           what follows is not an option

Source: getopt(3), section "getopt_long() and getopt_long_only()".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from v2v_async.errors import UsageError
from v2v_async.redact import redact

Argument = Literal["none", "required", "optional"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option as getopt and the help screen see it.

    ``names`` are spelled as people read them (``-os``, ``--bridge``, ``-b``); the first names the
    option in messages. ``once``: refused a second time. ``help`` is None for options that are
    accepted but not shown. ``not_built``: known, refused by name.
    """

    names: tuple[str, ...]
    metavar: str | None = None
    help: str | None = None
    group: str = "general"
    argument: Argument = "none"
    once: bool = False
    not_built: bool = False
    files: Literal["file", "directory"] | None = None

    @property
    def name(self) -> str:
        """The spelling used in messages."""
        return self.names[0]

    @property
    def long_names(self) -> tuple[str, ...]:
        """Names without dashes that getopt compares with ``-NAME`` and ``--NAME``."""
        return tuple(name.lstrip("-") for name in self.names if not _is_short(name))

    @property
    def letters(self) -> tuple[str, ...]:
        """One-letter names."""
        return tuple(name[1] for name in self.names if _is_short(name))


@dataclass(frozen=True, slots=True)
class Given:
    """An option on a command line, with its argument if it has one."""

    option: Option
    value: str | None


@dataclass(frozen=True, slots=True)
class Word:
    """An argument on a command line that is not an option."""

    text: str


def _is_short(name: str) -> bool:
    return len(name) == 2 and name[0] == "-" and name[1] != "-"


def parse(options: Sequence[Option], argv: Sequence[str]) -> Iterator[Given | Word]:
    """Yield options and other words in the order of ``argv``.

    An error is raised when it is reached, so ``--help --nonsense`` still helps, as in virt-v2v.
    Arguments of unknown options are never quoted: they may hold a key.

    Raises:
        UsageError: unknown or ambiguous option, argument missing or not wanted, option repeated.
    """
    longs = {name: option for option in options for name in option.long_names}
    letters = {letter: option for option in options for letter in option.letters}
    seen: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            yield from map(Word, words)
            return
        if len(word) < 2 or word[0] != "-":
            yield Word(word)
            continue
        for given in _one(word, words, longs, letters):
            if given.option.once and given.option.name in seen:
                raise UsageError(
                    f"{given.option.name} was given more than once",
                    hint=f"keep one {given.option.name}",
                )
            seen.add(given.option.name)
            yield given


def _one(
    word: str, rest: list[str], longs: dict[str, Option], letters: dict[str, Option]
) -> Iterator[Given]:
    """Yield what ``word`` means, taking a separate argument from ``rest`` where it needs one."""
    dashes = "--" if word.startswith("--") else "-"
    if dashes == "-" and len(word) == 2 and word[1] in letters:
        yield from _cluster(word[1:], rest, letters)
        return
    name, equals, value = word[len(dashes) :].partition("=")
    option = _long(dashes + name, name, longs)
    if option is not None:
        yield _with_argument(option, dashes + name, value if equals else None, rest)
    elif dashes == "-" and word[1] in letters:
        yield from _cluster(word[1:], rest, letters)
    else:
        raise UsageError(
            f"unknown option ‘{redact(dashes + name)}’", hint=_nearest(name, longs, letters)
        )


def _long(spelled: str, name: str, longs: dict[str, Option]) -> Option | None:
    """Return the option whose long name is ``name`` or alone begins with it."""
    if name in longs:
        return longs[name]
    beginning = sorted(long for long in longs if long.startswith(name))
    if len(beginning) > 1:
        raise UsageError(
            f"option ‘{spelled}’ is ambiguous",
            hint="write one of " + ", ".join(_dashed(long, longs[long]) for long in beginning),
        )
    return longs[beginning[0]] if beginning else None


def _cluster(cluster: str, rest: list[str], letters: dict[str, Option]) -> Iterator[Given]:
    """Yield the one-letter options in ``cluster``; the first with an argument takes the rest."""
    while cluster:
        letter, cluster = cluster[0], cluster[1:]
        option = letters.get(letter)
        if option is None:
            raise UsageError(f"unknown option ‘-{letter}’", hint="see --help")
        if option.argument == "none":
            yield Given(option, None)
            continue
        yield _with_argument(option, f"-{letter}", cluster or None, rest)
        return


def _with_argument(option: Option, spelled: str, value: str | None, rest: list[str]) -> Given:
    if option.argument == "none" and value is not None:
        raise UsageError(f"option ‘{spelled}’ takes no argument", hint=f"write {option.name} alone")
    if option.argument == "required" and value is None:
        if not rest:
            raise UsageError(
                f"option ‘{spelled}’ needs an argument",
                hint=f"write {option.name} {option.metavar}",
            )
        value = rest.pop(0)
    return Given(option, value)


def _dashed(long: str, option: Option) -> str:
    return next((n for n in option.names if n.lstrip("-") == long), f"--{long}")


def _nearest(name: str, longs: dict[str, Option], letters: dict[str, Option]) -> str:
    from difflib import get_close_matches  # 4 ms to import: only where it is needed

    close = get_close_matches(name, [*longs, *letters], n=1)
    if not close:
        return "see --help"
    spelled = _dashed(close[0], longs[close[0]]) if close[0] in longs else f"-{close[0]}"
    return f"did you mean {spelled}? See --help"
