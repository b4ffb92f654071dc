"""The tuner before simulated servers: what it ends with, how soon, and what it leaves alone."""

from __future__ import annotations

import pytest

from tests.simulated_server import ServerKind, Simulation
from v2v_async.copy.tuning import Limits, Setting, Tuner
from v2v_async.units import GIB, MIB

MB = 1_000_000
START = Setting(MIB, 4, 2)
LIMITS = Limits(4 * MIB, 16, 8, 128 * MIB)
SEEDS = range(6)


def tuned(
    kind: ServerKind,
    seed: int = 0,
    total: int = GIB,
    limits: Limits = LIMITS,
    start: Setting = START,
) -> tuple[Tuner, Simulation]:
    tuner = Tuner(start, limits)
    return tuner, Simulation(kind, tuner, seed=seed).run(total)


def rate_of(kind: ServerKind, setting: Setting) -> float:
    """Return the rate with a setting that stays."""
    tuner = Tuner(setting, LIMITS)
    tuner.is_settled = True
    return Simulation(kind, tuner).run(GIB).rate


def best_rate(kind: ServerKind, limits: Limits = LIMITS) -> float:
    """Return the rate with the best setting of all that the limits allow."""
    return max(
        rate_of(kind, Setting(size, depth, connections))
        for size in (MIB, 4 * MIB)
        for depth in (1, 2, 4, 8, 16)
        for connections in (1, 2, 4, 8)
        if size * depth * connections <= limits.in_flight and size <= limits.request_size
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "kind",
    [
        ServerKind(0.0005),
        ServerKind(0.0005, bandwidth=1e9),
        ServerKind(0.002, jitter=0.9),
        ServerKind(0.0005, is_serialised=True),
    ],
    ids=["fast", "1 GB/s", "jitter", "serialised"],
)
def test_a_local_server_is_left_alone_at_once(kind: ServerKind, seed: int) -> None:
    tuner, simulation = tuned(kind, seed)
    assert tuner.setting == START
    assert tuner.is_settled
    assert len(simulation.settings) == 1
    assert simulation.settled_at is not None
    assert simulation.settled_at <= 16


def test_a_server_that_wakes_up_is_local_all_the_same() -> None:
    tuner = Tuner(START, LIMITS)
    for at in range(16):
        sent = at * 0.001
        tuner.note(sent + (0.3 if at < 3 else 0.002), sent, MIB)
    assert tuner.is_settled
    assert tuner.setting == START


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.2])
def test_a_slow_link_is_filled_within_a_gibibyte(delay_s: float, jitter: float, seed: int) -> None:
    kind = ServerKind(delay_s, jitter=jitter)
    tuner, simulation = tuned(kind, seed)
    assert rate_of(kind, tuner.setting) >= 0.8 * best_rate(kind)
    # Not only at its end: the setting is that one when half of it has been read.
    last, _ = simulation.settings[-1]
    assert simulation.read_before(last) < GIB // 2
    assert rate_of(kind, START) < 0.3 * best_rate(kind)


def test_a_slow_link_costs_little_to_find_out() -> None:
    """1 GiB over 50 ms in less than 0.8 s; the best setting from the start takes 0.44 s."""
    _, simulation = tuned(ServerKind(0.05))
    assert GIB / simulation.rate < 0.8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bandwidth", [4e9, 100 * MB])
@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.7])
def test_one_request_at_a_time_wants_them_larger(
    seed: int, bandwidth: float, jitter: float
) -> None:
    kind = ServerKind(0.02, bandwidth=bandwidth, is_serialised=True, jitter=jitter)
    tuner, _ = tuned(kind, seed)
    assert tuner.is_settled
    # More at a time would only wait there.
    assert tuner.setting == Setting(4 * MIB, START.depth, START.connections)


@pytest.mark.parametrize("start", [Setting(MIB, depth, n) for depth in (1, 4) for n in (1, 4)])
def test_where_it_begins_does_not_matter(start: Setting) -> None:
    link, alone = ServerKind(0.05), ServerKind(0.02, is_serialised=True)
    rate_limited = ServerKind(0.0005, connection_bandwidth=40 * MB)
    tuner, _ = tuned(link, total=4 * GIB, start=start)
    assert rate_of(link, tuner.setting) >= 0.8 * best_rate(link)
    tuner, _ = tuned(alone, total=4 * GIB, start=start)
    assert tuner.setting == Setting(4 * MIB, start.depth, start.connections)
    tuner, _ = tuned(rate_limited, total=4 * GIB, start=start)
    assert tuner.setting == Setting(MIB, start.depth, 8)


def test_one_request_at_a_time_on_each_connection_wants_more_of_them() -> None:
    tuner, _ = tuned(ServerKind(0.05, width=1), total=4 * GIB)
    assert tuner.is_settled
    assert tuner.setting == Setting(4 * MIB, 4, 8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("jitter", [0.0, 0.9])
def test_a_rate_for_each_connection_wants_more_of_them(seed: int, jitter: float) -> None:
    kind = ServerKind(0.0005, connection_bandwidth=40 * MB, jitter=jitter)
    tuner, simulation = tuned(kind, seed)
    assert tuner.is_settled
    assert tuner.setting == Setting(START.request_size, START.depth, LIMITS.connections)
    # While it tries larger ones and more of them, it holds some of both for a moment.
    assert simulation.most_in_flight <= LIMITS.in_flight // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_for_each_connection_and_no_more_of_them_is_left_alone(seed: int) -> None:
    kind = ServerKind(0.0005, connection_bandwidth=40 * MB, jitter=0.5)
    limits = Limits(4 * MIB, 16, START.connections, 128 * MIB)
    tuner, _ = tuned(kind, seed, limits=limits)
    assert tuner.is_settled
    assert tuner.setting == START


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("delay_s", [0.0005, 0.02, 0.05])
@pytest.mark.parametrize("jitter", [0.0, 0.9])
def test_a_thin_wire_is_left_alone(delay_s: float, jitter: float, seed: int) -> None:
    """It is full from the start: nothing brings more."""
    tuner, _ = tuned(ServerKind(delay_s, bandwidth=80 * MB, jitter=jitter), seed)
    assert tuner.is_settled
    assert tuner.setting == START


def test_connections_that_come_late_are_waited_for() -> None:
    """TLS over 50 ms takes half a second; a round without them would say that they bring none."""
    kind = ServerKind(0.05, connection_bandwidth=40 * MB)
    tuner = Tuner(START, LIMITS)
    Simulation(kind, tuner, connect_s=0.9).run(2 * GIB)
    assert tuner.setting.connections == 8


@pytest.mark.parametrize("at_once", [1, 2, 4, 16])
def test_many_disks_share_what_may_be_in_flight(at_once: int) -> None:
    kind = ServerKind(0.05)
    lanes = 2 if at_once < 16 else 1
    start = Setting(MIB, max(1, min(4, 64 // (at_once * lanes))), lanes)
    limits = Limits(4 * MIB, 16, 8, 128 * MIB // at_once)
    tuner = Tuner(start, limits)
    simulation = Simulation(kind, tuner).run(GIB)
    assert simulation.most_in_flight <= 128 * MIB // at_once
    assert tuner.setting.in_flight >= 128 * MIB // at_once // 2


@pytest.mark.parametrize(
    "limits",
    [
        Limits(MIB, 16, 8, 128 * MIB),
        Limits(4 * MIB, 4, 8, 128 * MIB),
        Limits(4 * MIB, 16, 2, 128 * MIB),
        Limits(MIB, 4, 2, 128 * MIB),
        Limits(4 * MIB, 16, 8, 8 * MIB),
    ],
    ids=["size", "depth", "connections", "all", "in flight"],
)
def test_what_a_person_fixed_stays(limits: Limits) -> None:
    tuner, simulation = tuned(ServerKind(0.05), total=4 * GIB, limits=limits)
    assert tuner.is_settled
    for _, setting in simulation.settings:
        assert setting.request_size <= limits.request_size
        assert setting.depth <= limits.depth
        assert setting.connections <= limits.connections
        assert setting.in_flight <= limits.in_flight
    best = max(
        rate_of(ServerKind(0.05), Setting(size, depth, connections))
        for size in {MIB, limits.request_size}
        for depth in range(1, limits.depth + 1)
        for connections in range(1, limits.connections + 1)
        if size * depth * connections <= limits.in_flight
    )
    assert rate_of(ServerKind(0.05), tuner.setting) >= 0.8 * best


def test_a_settled_tuner_says_so_and_does_nothing() -> None:
    tuner = Tuner(START, LIMITS)
    tuner.is_settled = True
    assert not any(tuner.note(at + 1.0, at, MIB) for at in range(1000))
    assert tuner.setting == START


def test_answers_to_what_was_asked_before_a_change_do_not_count() -> None:
    tuner = Tuner(START, LIMITS)
    now = 0.0
    while not tuner.note(now + 0.05, now, MIB):
        now += 0.01
    changed = tuner.setting
    assert changed.request_size == 4 * MIB
    # These were asked for with the setting before, however many they are.
    assert not any(tuner.note(now + 0.06 + at / 1000, now - 1, MIB) for at in range(1000))
    assert tuner.setting == changed
