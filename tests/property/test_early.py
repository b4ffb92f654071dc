"""What is copied early and what then is the rest: together the target is that of a late copy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_early import SIZE, disk_copy
from v2v_async.copy.early import Early, rest_parts
from v2v_async.copy.ranges import Ranges
from v2v_async.events import Bytes

spans = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
        lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
    ),
    max_size=6,
)


def within(ranges: Ranges, at: int) -> bool:
    return ranges.contains(at, 1)


@given(
    changed=spans,
    became_zero=spans,
    wrote=spans,
    left_out=spans,
    block=st.sampled_from([1, 2, 8]),
    is_known_zero=st.booleans(),
)
def test_every_changed_byte_is_right_at_the_end(
    changed: list[tuple[int, int]],
    became_zero: list[tuple[int, int]],
    wrote: list[tuple[int, int]],
    left_out: list[tuple[int, int]],
    block: int,
    is_known_zero: bool,
) -> None:
    zero = Ranges(became_zero)
    data = Ranges(changed)
    for offset, length in zero:
        data.remove(offset, length)
    outside = Ranges(
        (
            offset // block * block,
            min(-(-(offset + length) // block) * block, SIZE) - offset // block * block,
        )
        for offset, length in left_out
    )
    early = Ranges(wrote)
    for offset, length in outside:
        early.remove(offset, length)
    parts, kept = rest_parts(
        data,
        zero,
        wrote=early,
        left_out=outside,
        is_known_zero=is_known_zero,
        block=block,
        size=SIZE,
    )
    position = 0
    for start, end, _ in parts:
        assert position <= start < end <= SIZE
        assert start % block == 0
        assert end % block == 0 or end == SIZE
        position = end
    copied = Ranges((start, end - start) for start, end, kind in parts if kind == "data")
    zeroed = Ranges((start, end - start) for start, end, kind in parts if kind == "zero")
    for at in range(SIZE):
        if within(data, at):
            assert within(copied, at)
        elif within(zero, at):
            is_zero_already = not within(early, at) and (is_known_zero or not within(outside, at))
            assert within(copied, at) or within(zeroed, at) or is_zero_already
        # Zeroes are only made where everything is zero; what is copied is right by itself.
        if within(zeroed, at) or within(kept, at):
            assert within(zero, at)


@given(
    looks=st.lists(st.tuples(spans, st.integers(1, SIZE)), max_size=4),
    last=spans,
    is_zero=st.booleans(),
)
def test_bytes_add_up(
    looks: list[tuple[list[tuple[int, int]], int]], last: list[tuple[int, int]], is_zero: bool
) -> None:
    early = Early()
    copy = disk_copy()
    early.attach(copy)
    changed = Ranges(last)

    def do(size: int) -> bool:
        chunk = copy.claim(size)
        if chunk is None:
            return False
        chunk.examined = chunk.length
        half = chunk.length // 2
        chunk.copied = chunk.data = half
        chunk.skipped = chunk.length - half
        copy.note_wrote(chunk.offset, half)
        copy.landed(chunk, 0)
        return True

    for spans_, size in looks:
        early.leave_out(spans_)
        for offset, length in spans_:
            changed.add(offset, length)
        do(size)
    while do(8):
        pass
    for offset, length in early.left_out:
        changed.add(offset, length)
    rest = early.rest([], changed) if is_zero else early.rest(changed, [])
    late = Bytes(
        total=SIZE,
        data=sum(end - start for start, end, kind in rest.parts if kind == "data"),
        copied=sum(end - start for start, end, kind in rest.parts if kind == "data"),
        zero=sum(end - start for start, end, kind in rest.parts if kind == "zero"),
    )
    joined = rest.join(copy.bytes(), late)
    assert joined.landed == joined.total == SIZE
    assert joined.data == joined.copied
    assert min(joined.zero, joined.skipped, joined.wasted) >= 0
