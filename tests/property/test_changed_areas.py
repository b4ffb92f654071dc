"""Whatever pages a server tells, nothing that has changed is left out."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.copy.ranges import Ranges
from v2v_async.warm import changed_areas
from v2v_async.warm.changed_areas import changed_ranges, is_same_line
from v2v_async.warm.vmware_calls import Page

SIZE = 64


@given(
    changed=st.sets(st.integers(0, SIZE - 1)),
    lengths=st.lists(st.integers(1, SIZE), min_size=1),
    order=st.randoms(use_true_random=False),
    most=st.integers(1, 9),
    doubles=st.booleans(),
    back=st.integers(0, 3),
)
def test_exactly_what_has_changed(
    changed: set[int],
    lengths: list[int],
    order: object,
    most: int,
    doubles: bool,
    back: int,
) -> None:
    """Pages of any length, that begin at or before what was asked for, in any order."""
    asked: list[int] = []

    async def ask(start: int) -> Page:
        asked.append(start)
        length = lengths[len(asked) % len(lengths)]
        begin = max(0, start - back)
        inside = [block for block in sorted(changed) if start <= block < start + length]
        end = min(SIZE, start + length)
        if len(inside) > most:
            end, inside = inside[most], inside[:most]
        areas = [(block, 1) for block in inside] * (2 if doubles else 1)
        order.shuffle(areas)  # type: ignore[attr-defined]
        return Page(begin, end - begin, areas)

    found, supposed = anyio.run(changed_ranges, ask, SIZE)
    assert found == Ranges((block, 1) for block in changed)
    assert supposed == 0
    assert asked == sorted(set(asked))


@pytest.mark.parametrize(
    ("pages", "expected", "supposed"),
    [
        ([Page(0, 0, [])], [(0, 64)], 64),  # it goes nowhere
        ([Page(0, 10, [(2, 3)]), Page(0, 10, [])], [(2, 3), (10, 54)], 54),
        ([Page(16, 48, [(20, 1)])], [(0, 16), (20, 1)], 16),  # nothing of what was asked for
        ([Page(0, 64, [(60, 99)])], [(60, 4)], 0),  # more than the disk has
        ([Page(0, 99, [])], [], 0),
    ],
)
def test_answers_that_make_no_sense(
    pages: list[Page], expected: list[tuple[int, int]], supposed: int
) -> None:
    """What should have been told counts as changed."""
    told = iter(pages)

    async def ask(start: int) -> Page:
        return next(told)

    assert anyio.run(changed_ranges, ask, SIZE) == (Ranges(expected), supposed)


def test_a_full_page_is_not_believed_to_be_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changed_areas, "FULL_PAGE", 2)
    blocks = [3, 9, 20, 33, 40]

    async def ask(start: int) -> Page:
        return Page(start, SIZE - start, [(each, 1) for each in blocks if each >= start][:2])

    assert anyio.run(changed_ranges, ask, SIZE) == (Ranges((each, 1) for each in blocks), 0)


@pytest.mark.parametrize(
    ("since", "now", "expected"),
    [
        ("52 aa/1", "52 aa/1", True),
        ("52 aa/9", "52 aa/10", True),
        ("52 aa/10", "52 aa/9", False),
        ("52 aa/1", "52 bb/2", False),
        ("*", "52 aa/1", False),
        ("", "", False),
        ("52 aa/x", "52 aa/y", False),
    ],
)
def test_one_history(since: str, now: str, expected: bool) -> None:
    assert is_same_line(since, now) is expected
