from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from v2v_async.copy.plan import Plan, arrange, split_zeroes
from v2v_async.extent import Extent

Runs = list[tuple[int, bool]]
RUNS = st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=20)


def extents_of(runs: Runs) -> list[Extent]:
    extents, position = [], 0
    for length, is_zero in runs:
        extents.append(Extent(position, length, is_zero))
        position += length
    return extents


@given(
    runs=RUNS,
    request_size=st.sampled_from([512, 1024, 4096]),
    zero_size=st.sampled_from([1000, 4096, 10**6]),
    target=RUNS,
    all_zero=st.booleans(),
    bridge=st.sampled_from([0, 100, 3000]),
)
def test_every_byte_is_planned_once(
    runs: Runs, request_size: int, zero_size: int, target: Runs, all_zero: bool, bridge: int
) -> None:
    extents = extents_of(runs)
    size = extents[-1].end
    is_zero = [extent.is_zero for extent in extents for _ in range(extent.length)]
    zeroes = [(e.offset, e.end) for e in extents_of(target) if e.is_zero]
    has_zeroes = [any(start <= at < end for start, end in zeroes) for at in range(size)]
    plan = Plan(arrange(extents, zeroes, all_zero=all_zero, bridge=bridge))
    at = 0
    while (request := plan.take(request_size, zero_size)) is not None:
        offset, end, kind = request
        assert offset == at
        assert offset < end
        at = end
        if kind == "data":  # no request crosses a multiple of the request size
            assert end - offset <= request_size
            assert offset // request_size == (end - 1) // request_size
            if not bridge:
                assert not any(is_zero[offset:end])
        else:
            assert all(is_zero[offset:end])
            assert kind == "skip" or end - offset <= zero_size
            already = [all_zero or has_zeroes[byte] for byte in range(offset, end)]
            assert all(already) if kind == "skip" else not any(already)
    assert at == size


def test_the_request_size_may_change_on_the_way() -> None:
    plan = Plan([(0, 10_000, "data")])
    assert plan.take(4096, 1) == (0, 4096, "data")
    assert plan.take(1024, 1) == (4096, 5120, "data")
    assert plan.take(8192, 1) == (5120, 8192, "data")
    assert plan.take(8192, 1) == (8192, 10_000, "data")
    assert plan.take(8192, 1) is None
    assert plan.take(8192, 1) is None


def test_only_a_short_gap_between_data_is_read_with_it() -> None:
    extents = extents_of([(10, False), (5, True), (10, False), (6, True), (10, False), (5, True)])
    assert arrange(extents, bridge=5) == [
        (0, 25, "data"),
        (25, 31, "zero"),
        (31, 41, "data"),
        (41, 46, "zero"),
    ]


def test_neighbouring_blocks_make_one_piece() -> None:
    blocks = [False, True, False, True, True, True]
    assert split_zeroes(blocks, 4, 22) == [
        (0, 4, False),
        (4, 4, True),
        (8, 4, False),
        (12, 10, True),
    ]


@given(blocks=st.lists(st.booleans(), min_size=1, max_size=40), cut=st.integers(0, 3))
def test_pieces_tile_the_buffer(blocks: list[bool], cut: int) -> None:
    length = len(blocks) * 4 - cut
    at = 0
    previous = None
    for start, piece, is_zero in split_zeroes(blocks, 4, length):
        assert start == at
        assert piece > 0
        assert is_zero != previous
        end = -(-(at + piece) // 4)
        assert set(blocks[at // 4 : end]) == {is_zero}
        at += piece
        previous = is_zero
    assert at == length
