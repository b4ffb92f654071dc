"""Whatever a server does, the tuner keeps its limits, comes to an end and makes nothing worse."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulated_server import ServerKind, Simulation
from v2v_async.copy.tuning import Limits, Setting, Tuner
from v2v_async.units import KIB, MIB

KINDS = st.builds(
    ServerKind,
    delay_s=st.floats(0.0001, 0.3),
    bandwidth=st.floats(1e6, 1e8),
    connection_bandwidth=st.floats(1e6, 1e8),
    width=st.sampled_from([1, 2, 16]),
    is_serialised=st.booleans(),
    jitter=st.sampled_from([0.0, 0.3, 0.9]),
)


@st.composite
def starts(draw: st.DrawFn) -> tuple[Setting, Limits]:
    """A setting and limits that it keeps to; those that equal it are what a person fixed."""
    start = Setting(
        draw(st.sampled_from([64 * KIB, 100_001, 256 * KIB, MIB, 4 * MIB])),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 9)),
    )
    limits = Limits(
        start.request_size * draw(st.sampled_from([1, 2, 3, 4, 16])),
        start.depth * draw(st.sampled_from([1, 2, 4])),
        start.connections * draw(st.sampled_from([1, 2, 3, 8])),
        start.in_flight * draw(st.integers(1, 64)),
    )
    return start, limits


def assert_within(setting: Setting, limits: Limits) -> None:
    assert 0 < setting.request_size <= limits.request_size
    assert 0 < setting.depth <= limits.depth
    assert 0 < setting.connections <= limits.connections
    assert setting.in_flight <= limits.in_flight


@settings(deadline=None, max_examples=60)
@given(kind=KINDS, chosen=starts(), seed=st.integers(0, 9))
def test_limits_are_kept_and_it_settles(
    kind: ServerKind, chosen: tuple[Setting, Limits], seed: int
) -> None:
    start, limits = chosen
    tuner = Tuner(start, limits)
    # Each round takes three waves and, for more connections, a few seconds.
    wave = limits.depth * limits.connections * limits.request_size
    total = 60 * wave + int(60 * kind.bandwidth)
    simulation = Simulation(kind, tuner, seed=seed).run(total, until_settled=True)
    assert tuner.is_settled
    for _, setting in simulation.settings:
        assert_within(setting, limits)
    assert len(simulation.settings) <= 12


@settings(deadline=None, max_examples=200)
@given(
    chosen=starts(),
    times=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), max_size=60),
    lengths=st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=5),
)
def test_any_times_at_all(
    chosen: tuple[Setting, Limits], times: list[tuple[float, float]], lengths: list[int]
) -> None:
    """Clocks that stand still and answers of any length neither break nor hold it."""
    start, limits = chosen
    tuner = Tuner(start, limits)
    now = 0.0
    at = 0
    while not tuner.is_settled:
        step, took = times[at % len(times)] if times else (0.0, 0.0)
        now += step
        before = tuner.setting
        has_changed = tuner.note(now, max(0.0, now - took), lengths[at % len(lengths)])
        assert has_changed == (tuner.setting != before)
        assert_within(tuner.setting, limits)
        at += 1
        if not sum(step for step, _ in times) and at > 100:
            return  # time does not pass, so that connections never come
        assert at < 200_000


@settings(deadline=None, max_examples=60)
@given(
    delay_s=st.floats(0.0001, 0.2),
    bandwidth=st.floats(20e6, 4e9),
    connection_bandwidth=st.floats(20e6, 4e9),
    width=st.sampled_from([1, 16]),
    is_serialised=st.booleans(),
    seed=st.integers(0, 9),
)
def test_nothing_gets_worse(
    delay_s: float,
    bandwidth: float,
    connection_bandwidth: float,
    width: int,
    is_serialised: bool,
    seed: int,
) -> None:
    kind = ServerKind(delay_s, bandwidth, connection_bandwidth, width, is_serialised, 0.3)
    start, limits = Setting(MIB, 4, 2), Limits(4 * MIB, 16, 8, 128 * MIB)
    tuner = Tuner(start, limits)
    Simulation(kind, tuner, seed=seed).run(1024 * MIB)
    rates = []
    for setting in (start, tuner.setting):
        fixed = Tuner(setting, limits)
        fixed.is_settled = True
        rates.append(Simulation(kind, fixed, seed=seed).run(512 * MIB).rate)
    assert rates[1] >= 0.9 * rates[0]
    if tuner.setting != start:
        assert rates[1] >= 1.1 * rates[0], "more is held in memory, and for nothing"
