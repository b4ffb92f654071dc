"""The heart of the copy: whatever the servers tell and in whatever order, every byte is right."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes import FakeHandle
from v2v_async.copy.disk import DiskCopy, geometry
from v2v_async.copy.lane import Lane
from v2v_async.errors import CopyError
from v2v_async.handle import Entries, ExportInfo
from v2v_async.units import KIB

MAX = 32 * 1024 * KIB


def info(size: int, block: int, *, can_zero: bool = True) -> ExportInfo:
    return ExportInfo(size, block, 4096, MAX, False, True, can_zero, False, False, True, True, True)


@st.composite
def disks(draw: st.DrawFn) -> bytearray:
    """A small disk of runs: random, zero, and zero with specks."""
    content = bytearray()
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.sampled_from([1, 511, 512, 4096, 40000, 65536, 70001]))
        kind = draw(st.sampled_from(["data", "zero", "speck"]))
        run = bytearray(length)
        if kind == "data":
            run[:] = bytes([draw(st.integers(1, 255))]) * length
        elif kind == "speck":
            run[draw(st.integers(0, length - 1))] = 7
        content += run
    return content


def honest(content: bytearray, grain: int) -> Entries:
    """The extents of a disk, told in pieces of ``grain`` bytes, unmerged."""
    entries = []
    for at in range(0, len(content), grain):
        piece = content[at : at + grain]
        entries.append((len(piece), 0 if any(piece) else 3))
    return entries


def tell(content: bytearray, grain: int, habit: str, offset: int, length: int) -> Entries | None:
    if habit == "fails":
        return None
    wanted = honest(content[offset : offset + length], grain)
    if habit == "short":
        return wanted[:1]
    if habit == "long":
        last, flags = wanted[-1]
        return [*wanted[:-1], (last + 10**9, flags)]
    if habit == "empty":
        return []
    if habit == "hole without zero":
        return [(n, 1 if flags else 0) for n, flags in wanted]
    return wanted


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=disks(),
    grain=st.sampled_from([512, 1000, 4096, 65536]),
    habit=st.sampled_from(["honest", "short", "long", "empty", "fails", "hole without zero"]),
    source_block=st.sampled_from([1, 512, 4096]),
    target_block=st.sampled_from([1, 512, 4096]),
    request_size=st.sampled_from([4096, 16384, 65536]),
    is_known_zero=st.booleans(),
    can_zero=st.booleans(),
    lanes=st.integers(1, 3),
    depth=st.integers(1, 4),
    larger=st.sampled_from([0, 4096, 100000]),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_arrives_in_any_order(
    content: bytearray,
    grain: int,
    habit: str,
    source_block: int,
    target_block: int,
    request_size: int,
    is_known_zero: bool,
    can_zero: bool,
    lanes: int,
    depth: int,
    larger: int,
    order: random.Random,
) -> None:
    content = content + bytearray(-len(content) % source_block)
    size = -(-(len(content) + larger) // target_block) * target_block
    target = bytearray(size) if is_known_zero else bytearray(b"\xee" * size)
    shape = geometry(
        info(len(content), source_block),
        info(size, target_block, can_zero=can_zero),
        lanes=lanes,
        request_size=request_size,
    )
    # A chunk is at least 4 MiB; these disks are smaller, so that it must be made small here.
    shape.chunk = -(-65536 // shape.request_size) * shape.request_size
    copy = DiskCopy(1, shape, is_known_zero, can_zero, can_extents=True)
    sources, targets, all_lanes = [], [], []
    for _ in range(lanes):
        source = FakeHandle(
            content, extents=lambda o, n: tell(content, grain, habit, o, n), block=source_block
        )
        sink = FakeHandle(target, block=target_block)
        sources.append(source)
        targets.append(sink)
        all_lanes.append(Lane(copy, source, sink, depth, lambda: None))  # type: ignore[arg-type]

    budget = lanes * depth * max(shape.request_size, target_block)
    while not all(lane.is_done for lane in all_lanes):
        for lane in all_lanes:
            lane.advance()
        assert sum(s.bytes_waiting for s in sources) <= budget
        ready = [h for h in (*sources, *targets) if h.waiting]
        if not ready:
            break
        handle = order.choice(ready)
        handle.waiting.pop(order.randrange(len(handle.waiting)))()
    assert all(lane.is_done for lane in all_lanes)
    assert copy.error is None

    assert target[: len(content)] == content
    assert not any(target[len(content) :])
    landed = copy.bytes()
    assert landed.landed == landed.total == len(content)
    assert landed.data == landed.copied
    assert all(lane.counters.in_flight == 0 for lane in all_lanes)
    if is_known_zero or not can_zero:
        assert all(op != "zero" for handle in targets for op, _, _ in handle.requests)


@settings(deadline=None, max_examples=120)
@given(
    content=disks(),
    op=st.sampled_from(["read", "write", "zero"]),
    nth=st.integers(0, 5),
    depth=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
)
def test_an_error_is_the_disks_error_and_nothing_stays_in_flight(
    content: bytearray, op: str, nth: int, depth: int, order: random.Random
) -> None:
    target = bytearray(b"\xee" * len(content))
    shape = geometry(info(len(content), 1), info(len(content), 1), lanes=1, request_size=16384)
    copy = DiskCopy(3, shape, is_known_zero=False, can_zero=True, can_extents=True)
    seen = {"n": 0, "at": -1}

    def fails(what: str, offset: int, length: int) -> int:
        if what != op:
            return 0
        seen["n"] += 1
        if seen["n"] == nth + 1:
            seen["at"] = offset
            return 28
        return 0

    source = FakeHandle(content, extents=lambda o, n: honest(content[o : o + n], 512), fails=fails)
    sink = FakeHandle(target, fails=fails)
    lane = Lane(copy, source, sink, depth, lambda: None)  # type: ignore[arg-type]
    while not lane.is_done:
        lane.advance()
        ready = [h for h in (source, sink) if h.waiting]
        if not ready:
            break
        handle = order.choice(ready)
        handle.waiting.pop(order.randrange(len(handle.waiting)))()
    assert lane.is_done
    assert lane.in_flight == 0
    if seen["at"] >= 0:
        assert isinstance(copy.error, CopyError)
        assert copy.error.disk == 3
        assert copy.error.offset == seen["at"]
        assert "ENOSPC" in str(copy.error)
        assert copy.bytes().landed < copy.bytes().total
    else:
        assert copy.error is None
        assert target == content
