"""Plain lines for files, pipes and CI logs: seconds since the start, then what happened.

::

    [   0.0] Reading the source's disks and hardware
    [  12.3] disk 1:  40%  720 MiB of 1.8 GiB, 250 MiB/s, 0:04 left

No cursor movement, no carriage return; colours only where they were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from v2v_async.events import Event
from v2v_async.render.plain_lines import PlainLines
from v2v_async.render.state import RunState, Work
from v2v_async.render.text import STARTS, lasted, moved, place
from v2v_async.units import format_duration, format_size

# A line for every 10 % of a disk at most once a second; a slow disk still shows life every 10 s.
_STEP = 0.10
_SHORTEST_S = 1.0
_LONGEST_S = 10.0


@dataclass(eq=False)
class Plain(PlainLines):
    """Write what happens to one guest, and how far its disks are."""

    codes = {"warning": "33", "failed": "31", "cancelled": "31", "finished": "32"}
    show_progress: bool = field(default=True, kw_only=True)
    _state: RunState = field(init=False, default_factory=RunState)
    _shown: dict[tuple[str, int], tuple[float, float, str]] = field(
        init=False, default_factory=dict
    )

    def __call__(self, event: Event) -> None:
        self._state.apply(event)
        if event.type == "warning":
            self._warning(event)
            return
        if self.quiet:
            return
        if event.type in ("progress", "verifying"):
            self._progress(event)
            return
        text = self._text(event)
        if text:
            self._lines(event, text)

    def _text(self, event: Event) -> str | None:
        """Return the line for ``event``, or None where there is nothing worth a line."""
        where = place(event, with_guest=len(self._state.guests) > 1)
        if event.type == "started":
            if event.step is None or event.disk is not None:
                return None
            title = STARTS.get(event.step, event.step)
            if event.guest is not None and len(self._state.guests) > 1:
                title = f"{event.guest}: {title}"
            return f"{title}: {event.text}" if event.text else title
        if event.type == "message":
            return f"{where}: {event.text}" if where and event.disk is not None else event.text
        if event.type == "retrying":
            return f"{where}: trying again" + (f": {event.text}" if event.text else "")
        if event.type == "debug":
            if not self.verbose:
                return None
            return f"{where}: {event.text}" if where else event.text
        if event.type in ("finished", "failed", "cancelled"):
            return self._ended(event, where)
        return None

    def _ended(self, event: Event, where: str) -> str | None:
        duration = self._state.duration(event)
        if event.disk is not None and event.type == "finished":
            if event.bytes is None or event.step not in (None, "copy"):
                return None
            return f"{where}: {moved(event.bytes, duration)}"
        if event.guest is not None and event.step is None and event.type == "finished":
            return None  # the run's own line follows
        after = f" after {lasted(duration)}" if duration is not None else ""
        if event.type == "finished":
            return f"{where or 'all'} done{after}"
        # Not the reason: the edge prints that once, at the end, with what to do about it.
        if event.type == "failed" and not where:
            return None
        return f"{where or 'run'} {event.type}{after}"

    def _progress(self, event: Event) -> None:
        if not self.show_progress or event.disk is None:
            return
        key = (event.guest or "", event.disk)
        disk = self._state.disks.get(key)
        if disk is None:
            return
        work = disk.work(event.time)
        time, fraction, label = self._shown.setdefault(key, (disk.started, 0.0, ""))
        if work.label != label:
            fraction = 0.0
        since = event.time - time
        risen = work.fraction - fraction >= _STEP and since >= _SHORTEST_S
        if risen or since >= _LONGEST_S:
            self._shown[key] = (event.time, work.fraction, work.label)
            where = f"disk {event.disk}"
            if len(self._state.guests) > 1 and event.guest is not None:
                where = f"{event.guest}, {where}"
            self._lines(event, f"{where}: {describe_progress(work)}")

    def _lines(self, event: Event, text: str) -> None:
        self.say(self._state.elapsed(event.time), event.type, text)

    def _warning(self, event: Event) -> None:
        where = place(event, with_guest=len(self._state.guests) > 1)
        self.warn(f"{where}: {event.text}" if where else str(event.text))


def describe_progress(work: Work) -> str:
    """Return ``40%  720 MiB of 1.8 GiB, 250 MiB/s, 0:04 left``."""
    text = f"{int(work.fraction * 100):3}%  {format_size(work.done)}"
    if work.total:
        text += f" of {format_size(work.total)}"
    if work.rate is not None:
        text += f", {format_size(work.rate)}/s"
        if work.rate > 0 and work.total:
            text += f", {format_duration((work.total - work.done) / work.rate)} left"
    return f"{work.label} {text.strip()}" if work.label else text
