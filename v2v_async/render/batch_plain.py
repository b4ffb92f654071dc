"""A batch in plain lines, for files, pipes and CI logs.

::

    [   0.0] web-01: attempt 1 begins
    [ 187.3] web-01: converted in 3:07
    [ 240.0] 2 done, 1 failed, 97 left of 100 guests: 38%  1.1 TiB of 2.8 TiB, 240 MiB/s, …
    [ 251.9] web-01: done in 4:12, 12.3 GiB copied

A line for what becomes of each guest, and one for all of them from time to time: as many for a
batch of an hour as for one of a day would be too many of the bytes that move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from v2v_async.events import Event
from v2v_async.render.batch_state import BatchState
from v2v_async.render.batch_words import Said, said, summary
from v2v_async.render.plain_lines import PlainLines
from v2v_async.render.text import clean, lasted
from v2v_async.units import format_duration, format_size

_SUMMARY_EVERY_S = 30.0


@dataclass(eq=False)
class BatchPlain(PlainLines):
    """Write what becomes of guests; with ``quiet`` only what is lost.

    A summary is written with the first event that comes 30 seconds after the last one.
    """

    codes = {
        "warning": "33", "retrying": "33", "failed": "31", "cancelled": "31", "finished": "32",
    }  # fmt: skip
    _state: BatchState = field(init=False, default_factory=BatchState)
    _next_summary: float | None = field(init=False, default=None)

    def __call__(self, event: Event) -> None:
        conversions = self._state.conversions
        self._state.apply(event)
        told = said(event, self._state, verbose=self.verbose) or self._also(event, conversions)
        # Quiet is silent but for guests that are lost; how it ended is told by the edge.
        is_loss = event.type == "failed" and event.guest is not None
        if told is not None and told.kind == "warning":
            self.warn(_whole(told))
        elif told is not None and (is_loss or not self.quiet):
            self._say(event, told)
        if not self.quiet:
            self._summary(event)

    def catch_up(self, events: Iterable[Event]) -> None:
        """Take in what happened before anybody looked: told in one line."""
        last = None
        for last in events:
            self._state.apply(last)
        if last is None:
            return
        self._next_summary = last.time + _SUMMARY_EVERY_S
        if not self.quiet:
            self._say(last, Said("summary", "", describe(self._state, last.time)))

    def _also(self, event: Event, conversions: int) -> Said | None:
        """Return what a log says beside what a screen does: the screen shows it as it goes on."""
        if event.guest is None or event.step is not None or event.disk is not None:
            return None
        guest = self._state.guests.get(event.guest)
        if guest is None:
            return None
        about = clean(guest.name)
        if event.type == "started":
            return Said("started", about, f"attempt {guest.attempt} begins")
        if event.type == "converted" and self._state.conversions > conversions:
            took = event.time - (guest.attempt_started or event.time)
            return Said("converted", about, f"converted in {lasted(max(took, 0.0))}")
        return None

    def _say(self, event: Event, told: Said) -> None:
        self.say(self._state.elapsed(event.time), told.kind, _whole(told), told.more)

    def _summary(self, event: Event) -> None:
        if self._next_summary is None or event.time - self._next_summary > _SUMMARY_EVERY_S * 2:
            # The first event, or the clock was set: not a line for each half minute in between.
            is_due = self._next_summary is not None
            self._next_summary = event.time + _SUMMARY_EVERY_S
        else:
            is_due = event.time >= self._next_summary
        # Before the guests are told of it is still being looked at: nothing can be summed up.
        if not is_due or self._state.outcome is not None or not self._state.guests:
            return
        self._next_summary = event.time + _SUMMARY_EVERY_S
        text = describe(self._state, event.time)
        self._say(event, Said("summary", "", text))


def _whole(told: Said) -> str:
    return f"{told.about}: {told.text}" if told.about else told.text


def describe(state: BatchState, now: float) -> str:
    """Return how far a batch is, in one line."""
    text = summary(state)
    if state.to_move:
        text += f": {int(state.fraction * 100)}%  {format_size(state.has_moved)}"
        text += f" of {format_size(state.to_move)}"
    if rate := state.rate(now):
        text += f", {format_size(rate)}/s"
    if (left_s := state.eta(now)) is not None:
        text += f", {format_duration(left_s)} left"
    running = ", ".join(
        f"{state.counts[phase]} {phase}"
        for phase in ("checking", "converting", "copying", "finalizing")
        if state.counts[phase]
    )
    return f"{text} ({running})" if running else text
