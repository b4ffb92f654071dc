"""The heart of the copy: whatever the servers tell and in whatever order, every byte is right."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fakes import FakeHandle
from v2v_async.copy.blocking import BlockingLane
from v2v_async.copy.digest import DigestKind, DiskDigest
from v2v_async.copy.disk import DiskCopy
from v2v_async.copy.geometry import Geometry, geometry
from v2v_async.copy.shared import Shared
from v2v_async.copy.shares import Budget
from v2v_async.copy.transfer import TransferLane
from v2v_async.copy.tuning import Limits, Setting, Tuner
from v2v_async.errors import ConnectionLostError, CopyError
from v2v_async.handle import Entries, ExportInfo
from v2v_async.units import KIB

MAX = 32 * 1024 * KIB
HABITS = ["honest", "short", "long", "empty", "fails", "hole without zero"]


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


def make_geometry(
    size: int, source_block: int, target_size: int, target_block: int, request_size: int
) -> Geometry:
    shape = geometry(
        info(size, source_block),
        info(target_size, target_block),
        lanes=1,
        request_size=request_size,
    )
    # A chunk is at least 4 MiB; these disks are smaller, so that it must be made small here.
    shape.chunk = shape.request_size
    return shape


def share(request_size: int, depth: int, *, retries: int = 0) -> Shared:
    setting = Setting(request_size, depth, 1)
    tuner = Tuner(setting, Limits(request_size, depth, 1, setting.in_flight))
    tuner.is_settled = True
    return Shared(tuner, Budget(1 << 30), retries=retries)


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=disks(),
    grain=st.sampled_from([512, 1000, 4096, 65536]),
    habit=st.sampled_from(HABITS),
    source_block=st.sampled_from([1, 512, 4096]),
    target_block=st.sampled_from([1, 512, 4096]),
    request_size=st.sampled_from([4096, 16384, 65536]),
    target_is=st.sampled_from(["known zero", "zero", "dirty", "half dirty", "silent"]),
    zeroes=st.sampled_from(["no", "slow", "fast"]),
    sparse=st.sampled_from([None, 0, 512]),
    allocated=st.booleans(),
    waits=st.booleans(),
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
    target_is: str,
    zeroes: str,
    sparse: int | None,
    allocated: bool,
    waits: bool,
    lanes: int,
    depth: int,
    larger: int,
    order: random.Random,
) -> None:
    content = content + bytearray(-len(content) % source_block)
    size = -(-(len(content) + larger) // target_block) * target_block
    fill = 0 if target_is in ("known zero", "zero") else 0xEE
    target = bytearray([fill]) * size
    if target_is == "half dirty":
        target[: size // 2] = bytes(size // 2)
    behind = bytes(target[-(-len(content) // target_block) * target_block :])
    shape = make_geometry(len(content), source_block, size, target_block, request_size)
    if sparse is not None:
        shape.sparse = sparse and max(sparse, target_block)
    digest = DiskDigest(DigestKind("sha256", 512), len(content))
    copy = DiskCopy(
        1,
        shape,
        is_known_zero=target_is == "known zero",
        can_zero=zeroes != "no",
        can_fast_zero=zeroes != "no",
        can_target_extents=target_is != "silent",
        allocated=allocated,
        digest=digest,
    )
    sources, targets, all_lanes = [], [], []
    blocking = []
    shared = share(shape.request_size, depth)
    for _ in range(lanes):
        source = FakeHandle(
            content, extents=lambda o, n: tell(content, grain, habit, o, n), block=source_block
        )
        sink = FakeHandle(
            target,
            block=target_block,
            is_fast=zeroes == "fast",
            extents=lambda o, n: honest(target[o : o + n], grain),
        )
        sources.append(source)
        targets.append(sink)
        if waits:
            blocking.append(BlockingLane(copy, source, sink, shared, lambda: None, 0))
        else:
            all_lanes.append(TransferLane(copy, source, sink, shared, lambda: None))
    order.shuffle(blocking)
    for lane in blocking:
        lane.run()

    budget = lanes * depth * max(shape.request_size, target_block)
    while not all(transfer.is_done for transfer in all_lanes):
        for transfer in all_lanes:
            transfer.advance()
        assert sum(s.bytes_waiting for s in sources) <= budget
        ready = [h for h in (*sources, *targets) if h.waiting]
        if not ready:
            break
        handle = order.choice(ready)
        handle.answer(order.randrange(len(handle.waiting)))
    assert all(transfer.is_done for transfer in all_lanes)
    assert copy.error is None
    assert copy.is_complete

    assert target[: len(content)] == content
    # What a larger target has behind the disk stays; a last block that was written is padded.
    assert target[-(-len(content) // target_block) * target_block :] == behind
    assert set(target[len(content) : len(target) - len(behind)]) <= {0, fill}
    landed = copy.bytes()
    assert landed.landed == landed.total == len(content)
    assert landed.data == landed.copied
    assert digest.hexdigest() == digest_of(content, 512)
    for transfer in all_lanes:
        transfer.finished()
    assert shared.budget.taken == 0
    ops = {op for handle in targets for op, _, _ in handle.requests}
    if zeroes == "no" or (target_is == "known zero" and not allocated):
        assert "zero" not in ops
    if allocated:
        assert landed.skipped == 0
    if target_is == "known zero" and not allocated:
        assert landed.zero == 0


@settings(deadline=None, max_examples=150)
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
    shape = make_geometry(len(content), 1, len(content), 1, 16384)
    copy = DiskCopy(3, shape)
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
    shared = share(shape.request_size, depth, retries=5)
    lane = TransferLane(copy, source, sink, shared, lambda: None)
    while not lane.is_done:
        lane.advance()
        ready = [h for h in (source, sink) if h.waiting]
        if not ready:
            break
        handle = order.choice(ready)
        handle.answer(order.randrange(len(handle.waiting)))
    assert lane.is_done
    assert lane.in_flight == 0
    lane.finished()
    assert shared.budget.taken == 0
    if seen["at"] >= 0:
        assert isinstance(copy.error, CopyError)
        assert copy.error.disk == 3
        # A buffer with zeroes in it is written in pieces; the request's own offset is told.
        assert copy.error.offset is not None
        assert copy.error.offset <= seen["at"] < copy.error.offset + 16384
        assert "ENOSPC" in str(copy.error)
        assert copy.bytes().landed < copy.bytes().total
    else:
        assert copy.error is None
        assert target == content


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=disks(),
    is_known_zero=st.booleans(),
    can_zero=st.booleans(),
    lanes=st.integers(1, 3),
    depth=st.integers(1, 3),
    cuts=st.integers(0, 12),
    flushes=st.integers(0, 30),
    order=st.randoms(use_true_random=False),
)
def test_no_byte_is_lost_when_servers_die_and_come_back(
    content: bytearray,
    is_known_zero: bool,
    can_zero: bool,
    lanes: int,
    depth: int,
    cuts: int,
    flushes: int,
    order: random.Random,
) -> None:
    """A target that dies forgets what it had not flushed; nothing durable is ever wrong."""
    size = len(content)
    target = bytearray([0 if is_known_zero else 0xEE]) * size
    durable = bytearray(target)
    shape = make_geometry(size, 1, size, 1, 4096)
    digest = DiskDigest(DigestKind("sha256", 512), size)
    copy = DiskCopy(1, shape, is_known_zero=is_known_zero, can_zero=can_zero, digest=digest)
    promised: list[tuple[int, int]] = []
    copy.on_durable = promised.extend
    shared = share(shape.request_size, depth)

    def new_lane() -> TransferLane:
        source = FakeHandle(content, extents=lambda o, n: honest(content[o : o + n], 512))
        sink = FakeHandle(target, flush_to=durable)
        return TransferLane(copy, source, sink, shared, lambda: None)

    running = [new_lane() for _ in range(lanes)]
    while not (copy.is_complete and not running):
        for lane in list(running):
            lane.advance()
            if lane.is_done:
                lane.finished()
                running.remove(lane)
        while copy.has_todo and len(running) < lanes:
            running.append(new_lane())
            running[-1].advance()
        ends = [end for lane in running for end in (lane.source, lane.target)]
        alive = [end for end in ends if isinstance(end, FakeHandle) and not end.is_lost]
        ready = [end for end in alive if end.waiting]
        if flushes and order.random() < 0.1:
            flushes -= 1
            copy.wants_flush = True
        elif cuts and alive and order.random() < 0.1:
            cuts -= 1
            victim = order.choice(alive)
            if any(victim is lane.target for lane in running):
                # The server dies: every connection to it is cut, what was not flushed is gone.
                for lane in running:
                    if not lane.target.is_lost:
                        lane.target.cut(order)  # type: ignore[attr-defined]
                        lane.lose("target", ConnectionLostError("gone"))
                target[:] = durable
            else:
                victim.cut(order)
                next(lane for lane in running if lane.source is victim).lose(
                    "source", ConnectionLostError("gone")
                )
        elif ready:
            handle = order.choice(ready)
            handle.answer(order.randrange(len(handle.waiting)))
        for offset, length in promised:
            assert durable[offset : offset + length] == content[offset : offset + length]
    assert copy.error is None
    assert target == content
    landed = copy.bytes()
    assert landed.landed == landed.total == size
    assert landed.data == landed.copied
    assert digest.hexdigest() == digest_of(content, 512)
    assert shared.budget.taken == 0


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=disks(),
    is_known_zero=st.booleans(),
    can_zero=st.booleans(),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["source", "target"])), max_size=8),
    flush_after=st.integers(1, 5),
)
def test_a_lane_that_waits_loses_no_byte_when_servers_die(
    content: bytearray,
    is_known_zero: bool,
    can_zero: bool,
    cuts: list[tuple[int, str]],
    flush_after: int,
) -> None:
    """Each cut comes after so many requests of its lane; a target forgets what is not flushed."""
    size = len(content)
    target = bytearray([0 if is_known_zero else 0xEE]) * size
    durable = bytearray(target)
    shape = make_geometry(size, 1, size, 1, 4096)
    digest = DiskDigest(DigestKind("sha256", 512), size)
    copy = DiskCopy(1, shape, is_known_zero=is_known_zero, can_zero=can_zero, digest=digest)
    promised: list[tuple[int, int]] = []
    copy.on_durable = promised.extend
    shared = share(shape.request_size, 1)
    left = list(cuts)
    rounds = 0
    while not copy.is_complete:
        rounds += 1
        source = FakeHandle(content, extents=lambda o, n: honest(content[o : o + n], 512))
        sink = FakeHandle(target)
        count, side = left.pop() if left else (1 << 30, "source")
        victim = source if side == "source" else sink
        seen = {"n": 0}

        def fails(op: str, offset: int, length: int, victim: FakeHandle = victim) -> int:
            seen["n"] += 1  # noqa: B023
            if seen["n"] > count:  # noqa: B023
                victim.is_lost = True
                return 107
            return 0

        victim.fails = fails
        lane = BlockingLane(copy, source, sink, shared, lambda: None, copy.epoch)
        lane.run()
        if lane.lost is not None and lane.lost[0] == "target":
            target[:] = durable
        elif rounds % flush_after == 0 and copy.begin_flush():
            durable[:] = target
            copy.flushed(copy.epoch)
        for offset, length in promised:
            assert durable[offset : offset + length] == content[offset : offset + length]
        assert copy.error is None
    assert target == content
    landed = copy.bytes()
    assert landed.landed == landed.total == size
    assert landed.data == landed.copied
    assert digest.hexdigest() == digest_of(content, 512)
    assert shared.budget.taken == 0


def test_data_told_of_behind_what_was_asked_for_is_not_asked_for_again() -> None:
    """As nbdkit's file plugin does it: one question is enough for a dense disk."""
    content = bytearray(random.Random(4).randbytes(300_000)) + bytearray(100_000)
    content += bytearray(random.Random(5).randbytes(100_000))
    target = bytearray(len(content))
    shape = make_geometry(len(content), 1, len(content), 1, 4096)
    copy = DiskCopy(1, shape, is_known_zero=True)
    asked = []

    def extents(offset: int, length: int) -> Entries:
        asked.append(offset)
        if offset < 300_000:
            return [(300_000 - offset, 0)]
        if offset < 400_000:
            return [(400_000 - offset, 3)]
        return [(10**9, 0)]

    shared = share(shape.request_size, 4)
    source = FakeHandle(content, extents=extents)
    BlockingLane(copy, source, FakeHandle(target), shared, _nothing, 0).run()
    assert target == content
    assert copy.bytes().copied == 400_000
    assert asked[0] == 0
    # Zeroes are not believed behind what was asked for: there may be data by now.
    assert len([offset for offset in asked if offset < 300_000]) == 1
    assert len([offset for offset in asked if 300_000 <= offset < 400_000]) > 1
    assert len([offset for offset in asked if offset >= 400_000]) == 1


def test_a_lane_that_waits_leaves_a_slow_server_to_others() -> None:
    """It stops after its request: what it has done counts, the rest is to be done."""
    content = bytearray(random.Random(3).randbytes(300_000))
    target = bytearray(len(content))
    shape = make_geometry(len(content), 1, len(content), 1, 4096)
    copy = DiskCopy(1, shape)
    shared = share(shape.request_size, 4)

    def slow(op: str, offset: int, length: int) -> int:
        shared.is_slow = shared.is_slow or offset >= 20_000
        return 0

    BlockingLane(
        copy, FakeHandle(content, fails=slow), FakeHandle(target), shared, _nothing, 0
    ).run()
    assert copy.has_todo
    done = copy.bytes()
    assert done.copied == 24_576
    assert done.landed == done.copied
    assert done.data == len(content)
    source, sink = FakeHandle(content), FakeHandle(target)
    lane = TransferLane(copy, source, sink, shared, _nothing)
    while not lane.is_done:
        lane.advance()
        for handle in (source, sink):
            while handle.waiting:
                handle.answer(0)
    assert target == content
    assert copy.bytes().landed == len(content)


@pytest.mark.parametrize("op", ["read", "write", "zero"])
@pytest.mark.parametrize(
    ("code", "tries"), [(5, 4), (28, 1), (1, 1)], ids=["EIO", "ENOSPC", "EPERM"]
)
def test_a_lane_that_waits_tries_again_where_it_helps(
    op: str, code: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v2v_async.copy.blocking.pause", lambda attempt: 0.0)
    content = bytearray(b"x" * 8192 + bytes(8192))
    shape = make_geometry(len(content), 1, len(content), 1, 4096)
    copy = DiskCopy(4, shape)
    shared = share(shape.request_size, 1, retries=3)

    def fails(what: str, offset: int, length: int) -> int:
        return code if what == op else 0

    source = FakeHandle(content, extents=lambda o, n: honest(content[o : o + n], 4096), fails=fails)
    sink = FakeHandle(bytearray(b"o" * len(content)), fails=fails)
    BlockingLane(copy, source, sink, shared, _nothing, 0).run()
    assert isinstance(copy.error, CopyError)
    assert copy.error.disk == 4
    assert copy.error.offset == (8192 if op == "zero" else 0)
    handle = source if op == "read" else sink
    assert [what for what, _, _ in handle.requests].count(op) == tries
    assert copy.bytes().landed < len(content)


def test_a_buffer_of_which_a_piece_failed_is_written_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of fifty pieces that each fail now and then, one would fail every time."""
    monkeypatch.setattr("v2v_async.copy.lane.pause", lambda attempt: 0.0)
    content = bytearray(b"x" * 4096 + bytes(4096)) * 8
    target = bytearray(len(content))
    shape = make_geometry(len(content), 1, len(content), 1, 65536)
    copy = DiskCopy(1, shape)
    shared = share(shape.request_size, 1, retries=1)

    def fails(op: str, offset: int, length: int) -> int:
        return 5 if op != "read" and length < 65536 else 0

    source = FakeHandle(content, extents=lambda o, n: [(n, 0)])
    sink = FakeHandle(target, fails=fails)
    lane = TransferLane(copy, source, sink, shared, _nothing)
    while not lane.is_done:
        lane.advance()
        for handle in (source, sink):
            while handle.waiting:
                handle.answer(0)
    assert copy.error is None
    assert target == content
    assert sink.requests[-1] == ("write", 0, 65536)
    assert copy.bytes().landed == len(content)


def _nothing() -> None:
    """Do nothing."""


def digest_of(content: bytearray, block: int) -> str:
    whole = hashlib.sha256()
    for at in range(0, len(content), block):
        whole.update(hashlib.sha256(content[at : at + block]).digest())
    whole.update(len(content).to_bytes(8, "little"))
    return whole.hexdigest()
