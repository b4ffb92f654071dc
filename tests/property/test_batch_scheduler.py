"""Whatever is asked of the scheduler, limits hold and everything starts in the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batch_simulation import Batch, Guest, simulate

CAPACITIES = {"conversions": 3, "disks": 4, "scratch": 10, "from0": 4, "to0": 5}

guests = st.builds(
    Guest,
    name=st.just(""),
    convert_s=st.floats(0.1, 100),
    needs=st.fixed_dictionaries({"conversions": st.integers(1, 3)}),
    keeps=st.fixed_dictionaries({"scratch": st.integers(0, 10)}),
    disks_s=st.lists(st.floats(0.1, 100), min_size=1, max_size=5).map(tuple),
    disk_needs=st.fixed_dictionaries(
        {"disks": st.integers(1, 4), "from0": st.integers(1, 4), "to0": st.integers(1, 5)}
    ),
    priority=st.integers(0, 2),
)


@given(st.lists(guests, min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_limits_hold_and_all_is_done(made: list[Guest]) -> None:
    named = {
        f"g{index}": Guest(
            f"g{index}",
            each.convert_s,
            each.needs,
            each.keeps,
            each.disks_s,
            each.disk_needs,
            each.priority,
        )
        for index, each in enumerate(made)
    }
    result = simulate(Batch(named, CAPACITIES))
    assert all(result.peak[name] <= CAPACITIES[name] for name in CAPACITIES)
    assert len(result.started) == sum(1 + len(each.disks_s) for each in made)
