"""What keeps guests of a batch from being converted, each told once however many have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from v2v_async.batch.retry import is_permanent
from v2v_async.errors import V2VError, leaves
from v2v_async.redact import redact

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``is_permanent``: only another plan or machine mends it.

    ``guests``: all that have it; none where it is the batch's. ``guest`` is the only one of them.
    """

    guest: str | None
    message: str
    hint: str | None = None
    is_permanent: bool = True
    guests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.guest is not None and not self.guests:
            object.__setattr__(self, "guests", (self.guest,))

    @property
    def where(self) -> str:
        """Whose it is, for people: ``web, db, mail and 17 more``; empty for the batch's."""
        return names(self.guests)

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.guests else self.message


def names(guests: Iterable[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    found = tuple(guests)
    shown = ", ".join(found[:_NAMED])
    more = len(found) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def of_guests(
    guests: Iterable[str], message: str, hint: str | None = None, *, is_permanent: bool = True
) -> Problem:
    """Return the problem that guests have together."""
    found = tuple(guests)
    only = found[0] if len(found) == 1 else None
    return Problem(only, message, hint, is_permanent, found)


def of_error(guest: str | None, error: V2VError | ExceptionGroup) -> Iterator[Problem]:
    """Yield what an error, or a group of them, says.

    Raises:
        ExceptionGroup: one of the group was not raised on purpose.
    """
    for leaf in leaves(error):
        if not isinstance(leaf, V2VError):
            raise error
        message = leaf.message if leaf.disk is None else f"disk {leaf.disk}: {leaf.message}"
        hint = None if leaf.hint is None else redact(leaf.hint)
        yield Problem(guest, redact(message), hint, is_permanent(leaf))


def merged(problems: Iterable[Problem]) -> list[Problem]:
    """Return each problem once, with all guests that have it; the batch's own come first."""
    found: dict[tuple[bool, str, str | None, bool], list[Problem]] = {}
    for each in problems:
        key = (bool(each.guests), each.message, each.hint, each.is_permanent)
        found.setdefault(key, []).append(each)
    together = [
        of_guests(
            dict.fromkeys(name for each in same for name in each.guests),
            same[0].message,
            same[0].hint,
            is_permanent=same[0].is_permanent,
        )
        for same in found.values()
    ]
    return sorted(together, key=lambda each: bool(each.guests))
