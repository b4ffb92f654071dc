"""What VMware's change tracking tells, page by page, put together so that nothing is forgotten.

::

    question at 0      |== ==   =|            a page: [0, 9) is described, three areas of it changed
    question at 9               |=  = ==|     the next begins where the last one's description ends
    question at 16                     |  |   until the disk's end

A page says for how much of the disk it speaks (``start``, ``length``). A server tells at most 2000
areas at once, in no promised order; whoever takes the first page for all of it loses the rest of
what has changed. Where an answer makes no sense, what it should have told counts as changed.
Source: QueryChangedDiskAreas in the vSphere Web Services API.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from v2v_async.copy.ranges import Ranges
from v2v_async.warm.vmware_calls import Page

FULL_PAGE = 2000
"""Areas in an answer from which on it may have been cut off."""


async def changed_ranges(ask: Callable[[int], Awaitable[Page]], size: int) -> tuple[Ranges, int]:
    """Return what has changed on a disk of ``size`` bytes, and how much of that is only supposed.

    ``ask`` returns the page that begins at an offset, in bytes; what it raises is raised.
    """
    found, supposed = Ranges(), 0
    offset = 0
    while offset < size:
        page = await ask(offset)
        for start, length in page.areas:
            _add(found, start, start + length, size)
        if page.start > offset:  # nothing was said of what is before it
            supposed += _add(found, offset, page.start, size)
        told = page.start + page.length
        if len(page.areas) >= FULL_PAGE:
            # As far as it surely speaks: were it cut off, its length may not say so.
            told = min(told, max(start + length for start, length in page.areas))
        if told <= offset:
            supposed += _add(found, offset, size, size)
            break
        offset = told
    return found, supposed


def is_same_line(since: str, now: str) -> bool:
    """Whether two change IDs, an older and a newer one, are of one history.

    A change ID is ``UUID/NUMBER``: tracking that began anew has another UUID, and a machine that
    was put back to an older state a smaller number. ``*`` and what is not of that form is none.
    """
    line, _, number = since.rpartition("/")
    now_line, _, now_number = now.rpartition("/")
    if not line or line != now_line:
        return False
    try:
        return int(number, 16) <= int(now_number, 16)
    except ValueError:
        return False


def _add(found: Ranges, start: int, end: int, size: int) -> int:
    """Add what of a range is on the disk; return its length."""
    start, end = max(0, start), min(end, size)
    if start < end:
        found.add(start, end - start)
    return max(0, end - start)
