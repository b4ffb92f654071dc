from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2v_async.copy.ranges import Ranges

SIZE = 60  # bytes of the model's disk: few, so that ranges meet

Change = tuple[bool, int, int]
changes = st.lists(st.tuples(st.booleans(), st.integers(0, SIZE), st.integers(0, 20)), max_size=40)


def apply(wanted: list[Change]) -> tuple[Ranges, set[int]]:
    """Return what the changes (add or remove, offset, length) make, and the model's bytes."""
    ranges, model = Ranges(), set[int]()
    for is_add, offset, length in wanted:
        if is_add:
            ranges.add(offset, length)
            model |= set(range(offset, offset + length))
        else:
            ranges.remove(offset, length)
            model -= set(range(offset, offset + length))
    return ranges, model


def members(pairs: list[tuple[int, int]]) -> list[int]:
    return [byte for offset, length in pairs for byte in range(offset, offset + length)]


@settings(deadline=None)
@given(changes)
def test_it_holds_what_was_added_and_not_removed(wanted: list[Change]) -> None:
    ranges, model = apply(wanted)
    pairs = list(ranges)
    assert members(pairs) == sorted(model)
    assert ranges.total == len(model)
    assert len(ranges) == len(pairs)
    assert bool(ranges) == bool(model)
    assert ranges.end == max(model, default=-1) + 1
    for (offset, length), (following, _) in pairwise(pairs):
        assert length > 0
        assert offset + length < following  # sorted and merged


@settings(deadline=None)
@given(changes, st.integers(0, SIZE + 30), st.integers(0, 30))
def test_contains_means_all_of_it(wanted: list[Change], offset: int, length: int) -> None:
    ranges, model = apply(wanted)
    assert ranges.contains(offset, length) == (set(range(offset, offset + length)) <= model)


@settings(deadline=None)
@given(changes, st.integers(0, SIZE + 30), st.integers(0, SIZE + 30))
def test_gaps_are_what_is_missing(wanted: list[Change], start: int, end: int) -> None:
    ranges, model = apply(wanted)
    gaps = list(ranges.gaps(start, end))
    assert members(gaps) == [byte for byte in range(start, end) if byte not in model]
    for (offset, length), (following, _) in pairwise(gaps):
        assert offset + length < following


@settings(deadline=None)
@given(changes, st.integers(1, 9))
def test_gaps_may_be_filled_while_they_are_told(wanted: list[Change], ahead: int) -> None:
    ranges, model = apply(wanted)
    for offset, length in ranges.gaps(0, SIZE):
        told = set(range(offset, offset + length))
        assert not told & model
        ranges.add(offset, length + ahead)
        model |= set(range(offset, offset + length + ahead))
    assert ranges.contains(0, SIZE)
    assert members(list(ranges)) == sorted(model)


@settings(deadline=None)
@given(changes, changes)
def test_a_copy_goes_its_own_way(wanted: list[Change], more: list[Change]) -> None:
    ranges, _ = apply(wanted)
    before = list(ranges)
    copy = ranges.copy()
    assert copy == ranges
    for is_add, offset, length in more:
        (copy.add if is_add else copy.remove)(offset, length)
    assert list(ranges) == before
    assert (copy == ranges) == (list(copy) == before)


@settings(deadline=None)
@given(changes)
def test_bounds_say_it_all(wanted: list[Change]) -> None:
    ranges, _ = apply(wanted)
    again = Ranges.from_bounds(ranges.bounds())
    assert again == ranges
    assert again.total == ranges.total
    assert Ranges(iter(ranges)) == ranges


@settings(deadline=None)
@given(changes, st.integers(0, 8))
def test_the_largest_are_kept(wanted: list[Change], count: int) -> None:
    ranges, _ = apply(wanted)
    kept = ranges.largest(count)
    assert len(kept) == min(count, len(ranges))
    assert all(ranges.contains(offset, length) for offset, length in kept)
    left = [length for offset, length in ranges if not kept.contains(offset, length)]
    assert max(left, default=0) <= min((length for _, length in kept), default=SIZE)
    assert kept.total == sum(length for _, length in kept)


@settings(deadline=None)
@given(changes, st.integers(1, 30), st.integers(1, 8))
def test_places_are_blocks_inside_spread_evenly(
    wanted: list[Change], count: int, block: int
) -> None:
    ranges, model = apply(wanted)
    places = ranges.places(count, block)
    assert places == sorted(set(places))
    assert min(count, bool(model)) <= len(places) <= count
    for offset, length in places:
        assert ranges.contains(offset, length)
        assert length > 0
        assert offset // block == (offset + length - 1) // block  # no block is cut twice
        assert offset % block == 0 or offset - 1 not in model
        assert (offset + length) % block == 0 or offset + length not in model
    if count >= len(model):
        assert sum(length for _, length in places) == len(model)


@pytest.mark.parametrize("bounds", [[1], [0, 0], [4, 2], [0, 4, 4, 8], [-1, 3], [0, 4, 2, 8]])
def test_what_are_no_bounds_is_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="not the bounds"):
        Ranges.from_bounds(bounds)


def test_no_range_is_refused_and_changes_nothing() -> None:
    ranges = Ranges([(0, 4)])
    for call in (ranges.add, ranges.remove, ranges.contains):
        with pytest.raises(ValueError, match="no range"):
            call(-1, 4)
        with pytest.raises(ValueError, match="no range"):
            call(1, -1)
    assert list(ranges) == [(0, 4)]


def test_it_is_shown_short() -> None:
    assert repr(Ranges([(0, 4), (8, 2)])) == "Ranges(0-4, 8-10: 6 bytes)"
    assert "…" in repr(Ranges((at * 10, 1) for at in range(9)))


def test_a_hundred_thousand_ranges_are_few() -> None:
    """Quadratic work (10¹⁰ steps) would run into the suite’s time limit."""
    offsets = [at * 8192 for at in range(100_000)]
    random.Random(1).shuffle(offsets)
    ranges = Ranges((offset, 4096) for offset in offsets)
    assert len(ranges) == 100_000
    assert sum(1 for _ in ranges.gaps(0, 8192 * 100_000)) == 100_000
    for offset in offsets:
        ranges.add(offset + 4096, 4096)
    assert list(ranges) == [(0, 8192 * 100_000)]
