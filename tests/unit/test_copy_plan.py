from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from v2v_async.copy.plan import Piece, plan, split_zeroes
from v2v_async.extent import Extent


@given(
    runs=st.lists(st.tuples(st.integers(1, 5000), st.booleans()), min_size=1, max_size=20),
    request_size=st.sampled_from([512, 1024, 4096]),
    zero_size=st.sampled_from([1000, 4096, 10**6]),
)
def test_every_byte_is_planned_once(
    runs: list[tuple[int, bool]], request_size: int, zero_size: int
) -> None:
    extents, position = [], 0
    for length, is_zero in runs:
        extents.append(Extent(position, length, is_zero))
        position += length
    at = 0
    for request in plan(extents, request_size, zero_size):
        assert request.offset == at
        assert 0 < request.length <= (zero_size if request.is_zero else request_size)
        if not request.is_zero:  # no request crosses a multiple of the request size
            end = request.offset + request.length - 1
            assert request.offset // request_size == end // request_size
        at += request.length
    assert at == position


def test_neighbouring_blocks_make_one_piece() -> None:
    blocks = [False, True, False, True, True, True]
    assert split_zeroes(blocks, 4, 22) == [
        Piece(0, 4, False),
        Piece(4, 4, True),
        Piece(8, 4, False),
        Piece(12, 10, True),
    ]


@given(blocks=st.lists(st.booleans(), min_size=1, max_size=40), cut=st.integers(0, 3))
def test_pieces_tile_the_buffer(blocks: list[bool], cut: int) -> None:
    length = len(blocks) * 4 - cut
    at = 0
    previous = None
    for piece in split_zeroes(blocks, 4, length):
        assert piece.start == at
        assert piece.length > 0
        assert piece.is_zero != previous
        end = -(-(at + piece.length) // 4)
        assert set(blocks[at // 4 : end]) == {piece.is_zero}
        at += piece.length
        previous = piece.is_zero
    assert at == length
