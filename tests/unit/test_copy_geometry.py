from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from v2v_async.copy.geometry import LARGEST_REQUEST, REQUEST_SIZE, geometry
from v2v_async.errors import CopyError, SizeMismatchError
from v2v_async.handle import ExportInfo
from v2v_async.units import GIB, KIB, MIB

PLAIN = ExportInfo(GIB, 1, 4096, 32 * MIB, False, True, True, False, False, True, True, True)
POWERS = st.sampled_from([1, 512, 4096, 65536])


@given(
    size=st.integers(0, 10**14),
    blocks=st.tuples(POWERS, POWERS),
    factors=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    preferred=st.tuples(st.integers(1, 64 * MIB), st.integers(1, 64 * MIB)),
    lanes=st.integers(1, 64),
    request_size=st.none() | st.integers(1, 64 * MIB),
    sparse=st.none() | st.integers(0, 20).map(lambda power: 512 << power) | st.just(0),
)
def test_every_size_is_one_that_both_servers_take(
    size: int,
    blocks: tuple[int, int],
    factors: tuple[int, int],
    preferred: tuple[int, int],
    lanes: int,
    request_size: int | None,
    sparse: int | None,
) -> None:
    source, target = (
        replace(
            PLAIN,
            size=-(-size // block) * block,
            minimum_block=block,
            preferred_block=max(block, wanted),
            maximum_block=max(block * factor, 1),
        )
        for block, factor, wanted in zip(blocks, factors, preferred, strict=True)
    )
    target = replace(target, size=max(source.size, target.size))
    largest = min(source.maximum_block, target.maximum_block)
    assume(max(blocks) <= largest)
    shape = geometry(source, target, lanes=lanes, request_size=request_size, sparse=sparse)
    assert shape.size == source.size
    for minimum in blocks:
        assert shape.block % minimum == 0
    for length in (shape.request_size, shape.largest_request, shape.zero_size, shape.chunk):
        assert length > 0
        assert length % shape.block == 0
    assert shape.chunk % shape.request_size == 0
    assert shape.request_size <= shape.largest_request <= largest
    assert shape.zero_size <= target.maximum_block
    assert shape.sparse % target.minimum_block == 0
    assert (shape.sparse == 0) == (sparse == 0)
    if request_size is not None:
        assert shape.request_size <= max(request_size, shape.block)


def test_without_wishes() -> None:
    shape = geometry(PLAIN, PLAIN, lanes=2)
    assert (shape.block, shape.target_block) == (1, 1)
    assert shape.request_size == REQUEST_SIZE
    assert shape.largest_request == LARGEST_REQUEST
    assert shape.sparse == 4 * KIB
    assert shape.chunk % REQUEST_SIZE == 0
    assert 4 * MIB <= shape.chunk <= 128 * MIB


@pytest.mark.parametrize(
    ("preferred", "wanted"), [(4096, REQUEST_SIZE), (2 * MIB, 2 * MIB), (64 * MIB, LARGEST_REQUEST)]
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_what_a_server_prefers_is_asked_for(side: str, preferred: int, wanted: int) -> None:
    told = replace(PLAIN, preferred_block=preferred)
    source, target = (told, PLAIN) if side == "source" else (PLAIN, told)
    assert geometry(source, target, lanes=1).request_size == wanted


def test_blocks_that_do_not_divide_each_other() -> None:
    """No server should, but what they say is all there is."""
    source, target = replace(PLAIN, minimum_block=512), replace(PLAIN, minimum_block=4096 * 3)
    shape = geometry(source, target, lanes=1, request_size=100_000)
    assert shape.block == 4096 * 3
    assert shape.request_size == 8 * 4096 * 3
    assert shape.sparse % (4096 * 3) == 0


@pytest.mark.parametrize(
    ("minimum", "maximum", "request_size", "wanted"),
    [
        (1, 32 * MIB, 100_001, 100_001),
        (4096, 32 * MIB, 100_001, 98_304),
        (65536, 32 * MIB, 4096, 65536),
        (1, 65536, None, 65536),
        (4096, 12288, None, 12288),
        (65536, 65536, None, 65536),
        (1, 2 * MIB, 8 * MIB, 2 * MIB),
        (1, 32 * MIB, 8 * MIB, 8 * MIB),
    ],
)
def test_request_sizes(minimum: int, maximum: int, request_size: int | None, wanted: int) -> None:
    target = replace(PLAIN, minimum_block=minimum, maximum_block=maximum)
    shape = geometry(PLAIN, target, lanes=1, request_size=request_size)
    assert shape.request_size == wanted
    assert shape.largest_request >= wanted


def test_zeroes_go_to_the_maximum_of_the_target_alone() -> None:
    source, target = replace(PLAIN, maximum_block=65536), replace(PLAIN, maximum_block=3 * MIB)
    assert geometry(source, target, lanes=1).zero_size == 3 * MIB
    assert geometry(target, source, lanes=1).zero_size == 65536


def test_a_target_that_is_larger_is_all_right() -> None:
    shape = geometry(PLAIN, replace(PLAIN, size=2 * GIB), lanes=1)
    assert shape.size == GIB


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(SizeMismatchError, match="1073741823 bytes, the source 1073741824"):
        geometry(PLAIN, replace(PLAIN, size=GIB - 1), lanes=1)
    with pytest.raises(CopyError, match="read-only"):
        geometry(PLAIN, replace(PLAIN, is_read_only=True), lanes=1)
    with pytest.raises(CopyError, match="need requests of 65536 bytes, and 32768 is the most"):
        geometry(replace(PLAIN, minimum_block=65536), replace(PLAIN, maximum_block=32768), lanes=1)


def test_an_empty_disk_has_sizes_too() -> None:
    shape = geometry(replace(PLAIN, size=0), PLAIN, lanes=16)
    assert shape.size == 0
    assert shape.chunk >= shape.request_size > 0
