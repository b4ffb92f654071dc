"""Applies the plan's windows to a run while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

import anyio

from v2v_async.batch.plan.model import Plan
from v2v_async.batch.runner import Runner
from v2v_async.batch.schedule.windows import limits_at, next_change
from v2v_async.events import Reporter

# A clock that is set, a laptop that sleeps: it is looked at again after so long at the latest.
_LONGEST_NAP_S = 30.0

SetRates = Callable[[Mapping[str, int]], None]


class Timetable:
    """Sets the limits that hold now. ``capacities`` are those outside all windows."""

    def __init__(
        self,
        plan: Plan,
        capacities: Mapping[str, int],
        runner: Runner,
        set_rates: SetRates,
        reporter: Reporter,
        *,
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._plan = plan
        self._capacities = capacities
        self._runner = runner
        self._set_rates = set_rates
        self._reporter = reporter
        self._clock = clock
        self._changed: dict[str, int] = {}
        self._rates: dict[str, int] | None = None

    def apply(self) -> None:
        """Set what holds now."""
        now = limits_at(self._plan.limits, self._plan.windows, self._clock())
        for name in {*self._changed, *now.capacities}:
            amount = now.capacities.get(name, self._capacities[name])
            if self._changed.get(name, self._capacities[name]) != amount:
                self._runner.set_capacity(name, amount)
                self._reporter.message(f"the limit of {name} is now {amount}")
        self._changed = now.capacities
        if now.rates != self._rates:
            if self._rates is not None:
                self._reporter.message("the bandwidth has changed: a window has opened or closed")
            self._set_rates(now.rates)
            self._rates = now.rates

    async def follow(self) -> None:
        """Go on setting it, until cancelled."""
        while True:
            due = next_change(self._plan.windows, self._clock())
            nap_s = _LONGEST_NAP_S
            if due is not None:
                nap_s = min(nap_s, max(0.0, (due - self._clock()).total_seconds()) + 0.01)
            await anyio.sleep(nap_s)
            self.apply()
