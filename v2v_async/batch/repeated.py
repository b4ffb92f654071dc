"""Warnings that many guests of a batch have in common, such as a KVM that does not work."""

from __future__ import annotations

from dataclasses import replace

from v2v_async.events import Event, Reporter


def once_each(reporter: Reporter) -> Reporter:
    """Return a reporter for the same run whose warnings are told for the first guest that has them.

    For the others they are only for who asks for more (``debug``).
    """
    told: dict[str | None, str | None] = {}

    def emit(event: Event) -> None:
        if event.type == "warning" and event.guest is not None:
            first = told.setdefault(event.text, event.guest)
            if first != event.guest:
                event = replace(event, type="debug")
        reporter.pass_on(event)

    return Reporter(emit, reporter.run)
