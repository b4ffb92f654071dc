"""Awkward block-status replies, one a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.extent import Extent, align_data, from_reply

D, H, Z, HZ = 0, 1, 2, 3


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param([(100, D)], [(0, 100, False)], id="whole"),
        pytest.param([(40, D), (60, HZ)], [(0, 40, False), (40, 60, True)], id="two"),
        pytest.param([(40, D), (60, D)], [(0, 100, False)], id="unmerged"),
        pytest.param([(40, HZ)], [(0, 40, True), (40, 60, False)], id="short: the rest is data"),
        pytest.param([(4000, HZ)], [(0, 100, True)], id="long: cut"),
        pytest.param([], [(0, 100, False)], id="failed: all is data"),
        pytest.param([(30, HZ), (0, D)], [(0, 30, True), (30, 70, False)], id="empty entry"),
        pytest.param([(100, H)], [(0, 100, False)], id="a hole without zeroes must be read"),
        pytest.param([(100, Z)], [(0, 100, True)], id="allocated zeroes"),
        pytest.param([(2**40, HZ)], [(0, 100, True)], id="64-bit length"),
    ],
)
def test_from_reply(entries: list[tuple[int, int]], expected: list[tuple[int, int, bool]]) -> None:
    got = [(e.offset, e.length, e.is_zero) for e in from_reply(0, 100, entries)]
    assert got == expected


@given(
    offset=st.integers(0, 2**40),
    length=st.integers(1, 10**6),
    entries=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3)), max_size=20),
)
def test_extents_tile_the_range(offset: int, length: int, entries: list[tuple[int, int]]) -> None:
    position = offset
    for extent in from_reply(offset, length, entries):
        assert extent.offset == position
        assert extent.length > 0
        position = extent.end
    assert position == offset + length


@given(
    blocks=st.integers(0, 5),
    lengths=st.lists(st.tuples(st.integers(1, 3000), st.booleans()), min_size=1, max_size=20),
    block=st.sampled_from([1, 512, 1024, 4096]),
)
def test_aligned_zeroes_lie_on_blocks_and_are_zero(
    blocks: int, lengths: list[tuple[int, bool]], block: int
) -> None:
    position = start = blocks * block
    extents: list[Extent] = []
    zeroes: set[int] = set()
    for length, is_zero in lengths:
        extents.append(Extent(position, length, is_zero))
        if is_zero:
            zeroes.update(range(position, position + length))
        position += length
    at = start
    for extent in align_data(extents, block, disk_size=position):
        assert extent.offset == at
        at = extent.end
        assert extent.offset % block == 0
        assert extent.end % block == 0 or extent.end == position
        if extent.is_zero:
            assert zeroes.issuperset(range(extent.offset, extent.end))
    assert at == position
