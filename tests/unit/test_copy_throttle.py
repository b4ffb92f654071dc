from __future__ import annotations

import heapq
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2v_async.copy.rate_file import RateFile
from v2v_async.copy.throttle import MAX_WAIT_S, STANDSTILL_S, DiskThrottle, Throttle, request_limit
from v2v_async.units import format_rate, parse_rate

MB = 1_000_000


class Simulation:
    """Lanes that ask a throttle under a clock of their own, and wake late by up to ``late_s``."""

    def __init__(self, rate: int | None, *, lanes: int, late_s: float = 0.0, seed: int = 0) -> None:
        self.now = 1000.0
        self.throttle = Throttle(rate, clock=lambda: self.now)
        self.late_s = late_s
        self.random = random.Random(seed)
        self.sent: list[tuple[float, int, int]] = []  # when, by whom, bytes
        self.asks = [(self.now, lane) for lane in range(lanes)]
        heapq.heapify(self.asks)

    def run(self, seconds: float, lengths: list[int], service_s: float = 0.0) -> None:
        """Let every lane send all it may for ``seconds``, each request ``service_s`` long."""
        end = self.now + seconds
        while self.asks and self.asks[0][0] <= end:
            at, lane = heapq.heappop(self.asks)
            self.now = at
            length = self.random.choice(lengths)
            wait = self.throttle.take(length, lane)
            assert 0 <= wait <= MAX_WAIT_S
            if not wait:
                self.sent.append((self.now, lane, length))
            again = self.now + (wait + self.random.uniform(0, self.late_s) if wait else service_s)
            heapq.heappush(self.asks, (again, lane))
        self.now = end

    def sent_between(self, start: float, stop: float) -> int:
        return sum(length for at, _, length in self.sent if start <= at < stop)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.integers(10_000, 2_000 * MB),
    lanes=st.integers(1, 20),
    late_s=st.sampled_from([0.0, 0.001, 0.03]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_five_seconds_hold_the_rate_to_a_tenth(
    rate: int, lanes: int, late_s: float, seed: int, data: st.DataObject
) -> None:
    largest = request_limit(rate)
    assert largest is not None
    smallest = max(largest // 64, rate // 4000)  # else it only takes long to simulate
    sizes = st.integers(min(smallest, largest), largest)
    lengths = data.draw(st.lists(sizes, min_size=1, max_size=5))
    simulation = Simulation(rate, lanes=lanes, late_s=late_s, seed=seed)
    begin = simulation.now
    simulation.run(8, lengths, service_s=min(lengths) / rate / 4)
    for step in range(12):
        start = begin + step / 4
        amount = simulation.sent_between(start, start + 5)
        assert 0.9 * 5 * rate <= amount <= 1.1 * 5 * rate


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.one_of(st.none(), st.integers(1, 100 * MB)), min_size=1, max_size=6),
    lengths=st.lists(st.integers(1, 40 * MB), min_size=1, max_size=4),
    lanes=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_no_requests_and_no_changes_exceed_the_rates(
    rates: list[int | None], lengths: list[int], lanes: int, seed: int
) -> None:
    simulation = Simulation(None, lanes=lanes, late_s=0.01, seed=seed)
    for rate in rates:
        simulation.throttle.set_rate(rate)
        before = len(simulation.sent)
        start = simulation.now
        simulation.run(3, lengths, service_s=0.05)
        sent = simulation.sent[before:]
        if rate is None:
            assert sent
            continue
        for first in range(0, len(sent), 7):
            amount = 0
            for at, _, length in sent[first:]:
                amount += length
                allowed = rate * (at - max(start, sent[first][0]) + 0.1)
                assert amount - length <= allowed + 1


def test_lanes_get_the_same_share() -> None:
    simulation = Simulation(10 * MB, lanes=16, late_s=0.005)
    simulation.run(20, [65536, 32768], service_s=0.001)
    counts = [sum(lane == who for _, who, _ in simulation.sent) for lane in range(16)]
    assert max(counts) - min(counts) <= 2
    assert min(counts) > 100


def test_idling_saves_up_a_tenth_of_a_second_at_most() -> None:
    simulation = Simulation(10 * MB, lanes=0)
    simulation.now += 3600
    amount = 0
    while simulation.throttle.take(1000) == 0:
        amount += 1000
    assert MB <= amount <= MB + 1000


def test_a_new_rate_counts_at_once() -> None:
    simulation = Simulation(1000, lanes=0)
    throttle = simulation.throttle
    assert throttle.take(512 * 1024) == 0
    assert throttle.take(4096) == MAX_WAIT_S  # for 524 s, if nothing changed
    throttle.set_rate(10 * MB)
    assert throttle.take(4096) == pytest.approx(512 * 1024 / 10 / MB)
    throttle.set_rate(None)
    assert throttle.take(4096) == 0


def test_a_lower_rate_does_not_stop_what_was_sent_before() -> None:
    simulation = Simulation(1000 * MB, lanes=0)
    assert simulation.throttle.take(10 * MB) == 0  # for 10 ms
    simulation.throttle.set_rate(10_000)
    assert simulation.throttle.take(4096) == pytest.approx(0.01)


def test_a_rate_comes_without_a_burst() -> None:
    simulation = Simulation(None, lanes=0)
    simulation.now += 3600
    simulation.throttle.set_rate(10 * MB)
    assert simulation.throttle.take(1000) == 0
    assert simulation.throttle.take(1000) > 0


def test_one_that_left_or_died_holds_nobody_up() -> None:
    simulation = Simulation(MB, lanes=0)
    throttle = simulation.throttle
    assert throttle.take(50_000, "a") == 0
    assert throttle.take(50_000, "leaves") == pytest.approx(0.05)
    assert throttle.take(500_000, "dies") == pytest.approx(0.1)
    throttle.leave("leaves")
    simulation.now += 0.1
    assert throttle.take(50_000, "b") > 0  # ‘dies’ has its place still
    simulation.now += 0.2
    assert throttle.take(50_000, "b") == 0


def test_a_small_request_does_not_pass_a_large_one_by() -> None:
    simulation = Simulation(MB, lanes=0)
    throttle = simulation.throttle
    assert throttle.take(50_000, "first") == 0
    wait = throttle.take(5 * MB, "large")
    assert throttle.take(1, "small") > wait
    simulation.now += 0.06
    assert throttle.take(1, "small") > 0
    assert throttle.take(5 * MB, "large") == 0


def test_threads_share_one_rate() -> None:
    rate, length, seconds = 10 * MB, 100_000, 5.0
    lock = threading.Lock()
    now = 0.0
    sent = [0] * 8
    throttle = Throttle(rate, clock=lambda: now)

    def lane(number: int) -> None:
        nonlocal now
        while now < seconds:
            if throttle.take(length, number) == 0:
                sent[number] += length
            else:
                with lock:
                    now += 0.0001

    threads = [threading.Thread(target=lane, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.9 * rate * seconds <= sum(sent) <= rate * (now + 0.1) + length


# Several disks, groups of them, and all together.


class Disks:
    """Disks whose lanes always want more, under a clock of their own."""

    def __init__(self, *, seed: int = 0) -> None:
        self.now = 1000.0
        self.random = random.Random(seed)
        self.sent: dict[str, int] = {}
        self._asks: list[tuple[float, int, str]] = []
        self._disks: list[tuple[DiskThrottle, list[int]]] = []

    def throttle(self, rate: int | None) -> Throttle:
        return Throttle(rate, clock=lambda: self.now)

    def add(self, name: str, throttle: DiskThrottle, lengths: list[int], lanes: int = 4) -> None:
        """Add a disk whose requests are of these lengths."""
        self.sent[name] = 0
        for _ in range(lanes):
            self._disks.append((throttle, lengths))
            heapq.heappush(self._asks, (self.now, len(self._disks) - 1, name))

    def run(self, seconds: float) -> dict[str, int]:
        """Let all send what they may; return bytes by disk."""
        end = self.now + seconds
        before = dict(self.sent)
        wanted: dict[int, int] = {}
        while self._asks[0][0] <= end:
            self.now, lane, name = heapq.heappop(self._asks)
            throttle, lengths = self._disks[lane]
            length = wanted.setdefault(lane, self.random.choice(lengths))
            wait = throttle.take(length, lane)
            assert 0 <= wait <= MAX_WAIT_S
            if not wait:
                self.sent[name] += wanted.pop(lane)
            # Threads wake a little late, and no two in the same order each time.
            late = self.random.uniform(0, 0.003)
            heapq.heappush(self._asks, (self.now + wait + late, lane, name))
        self.now = end
        return {name: self.sent[name] - before[name] for name in self.sent}


@settings(max_examples=40, deadline=None)
@given(
    disks=st.lists(
        st.tuples(
            st.integers(1, 8), st.lists(st.integers(100_000, 500_000), min_size=1, max_size=3)
        ),
        min_size=2,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_disks_share_a_rate_whatever_lanes_and_requests_they_have(
    disks: list[tuple[int, list[int]]], seed: int
) -> None:
    world = Disks(seed=seed)
    rate = 10 * MB
    throttle = world.throttle(rate)
    for at, (lanes, lengths) in enumerate(disks):
        world.add(str(at), DiskThrottle([throttle]), lengths, lanes)
    sent = world.run(30)
    fair = rate * 30 / len(disks)
    assert sum(sent.values()) == pytest.approx(rate * 30, rel=0.02)
    # A disk of one lane with small requests that asks late now and then gets a little less.
    assert all(amount == pytest.approx(fair, rel=0.1) for amount in sent.values()), sent


@pytest.mark.parametrize(("lanes_a", "lanes_b"), [(4, 4), (1, 8), (8, 1)])
def test_groups_have_their_rates(lanes_a: int, lanes_b: int) -> None:
    world = Disks()
    total, a, b = (world.throttle(rate) for rate in (None, 2 * MB, 6 * MB))
    world.add("a1", DiskThrottle([a, total]), [100_000], lanes_a)
    world.add("b1", DiskThrottle([b, total]), [100_000], lanes_b)
    world.add("b2", DiskThrottle([b, total]), [50_000], lanes_b)
    sent = world.run(20)
    assert (sent["b1"] + sent["b2"]) / sent["a1"] == pytest.approx(3, rel=0.05)
    assert sent["b1"] / sent["b2"] == pytest.approx(1, rel=0.1)


def test_what_a_group_leaves_of_the_total_goes_to_the_others() -> None:
    world = Disks()
    total, narrow = world.throttle(10 * MB), world.throttle(MB)
    for at in range(3):
        world.add(f"narrow {at}", DiskThrottle([narrow, total]), [100_000], 8)
    world.add("wide", DiskThrottle([total]), [100_000], 2)
    sent = world.run(20)
    assert sum(sent.values()) == pytest.approx(200 * MB, rel=0.02)
    # They wait for their group, and hold no place of those who wait for the total.
    assert sent["wide"] == pytest.approx(180 * MB, rel=0.02)
    total.set_rate(20 * MB)
    narrow.set_rate(None)
    sent = world.run(20)
    assert [sent[name] / MB for name in sent] == pytest.approx([100] * 4, rel=0.05)


def test_a_disk_that_comes_late_begins_where_the_others_are() -> None:
    world = Disks()
    throttle = world.throttle(10 * MB)
    world.add("early", DiskThrottle([throttle]), [100_000])
    world.run(60)
    world.add("late", DiskThrottle([throttle]), [100_000])
    sent = world.run(10)
    assert sent["late"] / sent["early"] == pytest.approx(1, rel=0.05)


def test_who_leaves_gives_back_what_the_first_rate_let_through() -> None:
    world = Disks()
    group, total = world.throttle(MB), world.throttle(100_000)
    disk = DiskThrottle([group, total])
    assert disk.take(100_000, "first") == 0
    assert group.take(100_000, "other") > 0
    world.now += 0.2
    assert disk.take(60_000, "stays") > 0  # of the total; it has passed the group
    disk.leave("stays")
    assert group.take(100_000, "other") == 0


def test_a_disk_waits_for_what_is_no_rate() -> None:
    waits = [True]
    disk = DiskThrottle([], lambda: waits[0])
    assert disk.rate is None
    assert disk.take(1, "a") == STANDSTILL_S
    waits[0] = False
    assert disk.take(1, "a") == 0
    disk.leave("a")


def test_the_lowest_rate_says_how_large_requests_are() -> None:
    disk = DiskThrottle([Throttle(None), Throttle(3 * MB), Throttle(2 * MB)])
    assert disk.rate == 2 * MB


def test_no_rate_means_no_waiting() -> None:
    throttle = Throttle(None)
    assert [throttle.take(1 << 40) for _ in range(3)] == [0, 0, 0]
    assert throttle.rate is None


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_of_nothing_is_refused(rate: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        Throttle(rate)
    with pytest.raises(ValueError, match="no rate"):
        Throttle(None).set_rate(rate)


@settings(deadline=None)
@given(rate=st.integers(1, 100_000 * MB))
def test_requests_are_small_enough_for_the_rate(rate: int) -> None:
    limit = request_limit(rate)
    assert limit is not None
    assert limit.bit_count() == 1
    assert limit >= 4096
    assert limit == 4096 or rate / 40 < limit <= rate / 20


def test_without_a_rate_any_request_will_do() -> None:
    assert request_limit(None) is None


def write(path: Path, text: str | bytes) -> None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def test_a_rate_file_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "rate"
    file = RateFile(path, rate=5 * MB)
    assert (file.poll(), file.rate) == (None, 5 * MB)  # not there yet
    write(path, "8M\n")
    assert (file.poll(), file.rate) == (None, 1024 * 1024)
    write(path, "9M\nwhatever follows\n")
    assert (file.poll(), file.rate) == (None, 9 * 128 * 1024)
    write(path, "")  # a shell that has only opened it
    assert (file.poll(), file.rate) == (None, 9 * 128 * 1024)
    path.unlink()
    assert (file.poll(), file.rate) == (None, 9 * 128 * 1024)
    for text in ("0", "unlimited\n"):
        write(path, "1M")
        file.poll()
        write(path, text)
        assert (file.poll(), file.rate) == (None, None)


def test_a_change_is_seen_though_nothing_but_the_content_tells_it(tmp_path: Path) -> None:
    path = tmp_path / "rate"
    file = RateFile(path)
    write(path, "10M")
    stamp = path.stat()
    file.poll()
    write(path, "20M")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    file.poll()
    assert file.rate == parse_rate("20M")


@pytest.mark.parametrize("text", ["fast", "-1", "1.2.3M", "10M 20M", b"\xff\xfe\0"])
def test_a_rate_file_not_understood_is_told_once(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "rate"
    file = RateFile(path)
    write(path, "8M")
    file.poll()
    write(path, text)
    warning = file.poll()
    assert warning is not None
    assert str(path) in warning
    assert "the last rate is kept" in warning
    assert file.poll() is None
    assert file.rate == 1024 * 1024
    write(path, "16M")
    assert (file.poll(), file.rate) == (None, 2 * 1024 * 1024)
    write(path, text)
    assert file.poll() is not None  # wrong anew


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_told_once_and_hangs_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rate"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    file = RateFile(path, rate=7)
    warning = file.poll()
    assert warning is not None
    assert "not a regular file" in warning
    assert (file.poll(), file.rate) == (None, 7)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("8", 1),
        ("9", 2),  # rounded up: never to nothing
        ("10K", 1280),
        ("8M", 1024 * 1024),  # as nbdkit’s rate=8M
        ("8m", 1024 * 1024),
        ("1.5G", 3 * 2**26),
        (" 8M\n", 1024 * 1024),
        ("400Mbit/s", 50 * MB),
        ("400Mb/s", 50 * MB),
        ("400Mbps", 50 * MB),
        ("400 Mbit/s", 50 * MB),
        ("8Mibit/s", 1024 * 1024),
        ("50MB/s", 50 * MB),
        ("50MBps", 50 * MB),
        ("50mB/s", 50 * MB),
        ("50MiB/s", 50 << 20),
        ("1GiB/s", 1 << 30),
        ("0.5GB/s", 500 * MB),
        ("100B/s", 100),
        ("100bytes/s", 100),
    ],
)
def test_rates_are_read(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "fast", "-1", "10Q", "50MB", "50M/s", "1e6", "iB/s", "50iB/s", "٥M", "1.M", "1,5M"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0M", "0.0MB/s"])
def test_a_rate_of_zero_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="would never end"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("rate", "text"), [(None, "unlimited"), (512, "512 B/s"), (50 << 20, "50.0 MiB/s")]
)
def test_rates_are_written(rate: int | None, text: str) -> None:
    assert format_rate(rate) == text
