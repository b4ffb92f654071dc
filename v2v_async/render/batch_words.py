"""What is said for good about a batch: how guests ended, what they try again, what went wrong.

The same words scroll up at a terminal and stand in a log.
"""

from __future__ import annotations

from dataclasses import dataclass

from v2v_async.events import Event
from v2v_async.render.batch_rows import counted, place_of
from v2v_async.render.batch_state import BatchState, GuestView
from v2v_async.render.text import clean, lasted, place
from v2v_async.units import format_size


@dataclass(frozen=True, slots=True)
class Said:
    """Something said: by ``kind`` it is marked; ``about`` a guest or the batch; ``more`` below."""

    kind: str
    about: str
    text: str
    more: tuple[str, ...] = ()


def said(event: Event, state: BatchState, *, verbose: bool = False) -> Said | None:
    """Return what ``event``, which ``state`` knows already, is worth saying; mostly nothing."""
    if event.type == "warning":
        return Said("warning", place(event, with_guest=True), event.text or "")
    if event.type in ("message", "debug"):
        is_of_batch = event.guest is None and event.type == "message"
        if not (verbose or is_of_batch) or not event.text:
            return None
        return Said(event.type, place(event, with_guest=True), event.text)
    if event.step is not None or event.disk is not None:
        if event.type == "retrying" and event.text:
            return Said("retrying", place(event, with_guest=True), event.text)
        return None
    if event.guest is None:
        return _of_batch(event, state)
    guest = state.guests.get(event.guest)
    return None if guest is None else _of_guest(event, guest)


def _of_guest(event: Event, guest: GuestView) -> Said | None:
    about = clean(guest.name)
    if event.type == "finished":
        took = guest.elapsed(event.time)
        after = f" in {lasted(took)}" if took is not None else ""
        text = f"done{after}"
        if guest.moved:
            text += f", {format_size(guest.moved)} copied"
        if guest.attempt > 1:
            text += f", attempt {guest.attempt}"
        return Said("finished", about, text)
    if event.type == "failed" and guest.is_known_failure:
        return None
    if event.type == "failed" and guest.failure is not None:
        failure = guest.failure
        where = place_of(failure)
        more = (
            ("hint", failure.hint),
            ("log", failure.log),
            ("bundle", failure.bundle),
        )
        return Said(
            "failed",
            about,
            f"failed: {where + ': ' if where else ''}{failure.text}",
            tuple(f"{label}: {text}" for label, text in more if text),
        )
    if event.type == "retrying":
        return Said(
            "retrying",
            about,
            event.text or "trying again",
            (f"hint: {event.hint}",) if event.hint else (),
        )
    if event.type in ("cancelled", "paused", "resumed"):
        return Said(event.type, about, event.type)
    return None


def _of_batch(event: Event, state: BatchState) -> Said | None:
    if event.type in ("paused", "resumed"):
        return Said(event.type, "batch", event.type)
    # A batch that was refused has no guests yet; why is told by the edge.
    if event.type not in ("finished", "failed", "cancelled") or not state.guests:
        return None
    return Said(event.type, "batch", f"{summary(state)}, in {lasted(state.elapsed(event.time))}")


def summary(state: BatchState) -> str:
    """Return how many guests have come how far: ``55 done, 1 failed, 44 left of 100 guests``."""
    parts = [
        f"{count} {phase}"
        for phase in ("done", "failed", "cancelled")
        if (count := state.counts[phase])
    ]
    if state.left:
        paused = state.counts["paused"]
        parts.append(f"{state.left} left" + (f" ({paused} paused)" if paused else ""))
    return f"{', '.join(parts) or 'nothing'} of {counted(len(state.guests), 'guest')}"
