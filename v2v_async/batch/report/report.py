"""What became of a batch: each guest, the sums, and what to do next. Pure.

::

    plan + journal (+ events) ── report_of ──> BatchReport ─┬─ JSON (docs/schema/batch-report.json)
                                                            ├─ CSV        report_csv.py
                                                            ├─ HTML       report_html.py
                                                            └─ terminal   render/batch_report.py
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from v2v_async.batch.plan.model import GuestPlan, Plan
from v2v_async.batch.record.history import GuestHistory
from v2v_async.batch.record.journal import ENDED, AttemptRecord, Failure, GuestRecord, Phase
from v2v_async.events import Bytes
from v2v_async.redact import redact


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class BytesReport(_Part):
    """Bytes by class, as in the events."""

    total: int = Field(default=0, description="size of the disks")
    data: int = Field(default=0, description="what holds data, or was not examined")
    copied: int = Field(default=0, description="data written")
    zero: int = Field(default=0, description="written as zeroes")
    skipped: int = Field(default=0, description="zeroes that the target had already")
    resumed: int = Field(default=0, description="there from an earlier attempt")
    retried: int = Field(default=0, description="sent again to a target that was lost")


class FailureReport(_Part):
    """Why an attempt failed."""

    message: str
    hint: str | None = Field(default=None, description="what to do next")
    step: str | None = Field(default=None, description="input, convert, output, copy, finalize")
    disk: int | None = Field(default=None, description="from 1")
    offset: int | None = None
    log: str | None = None
    is_permanent: bool = Field(default=False, description="another attempt would fail too")


class AttemptReport(_Part):
    """One attempt at a guest."""

    number: int
    began: float = Field(description="seconds since the epoch")
    ended: float | None = None
    phase: Phase = Field(description="how far it came")
    failure: FailureReport | None = None


class GuestReport(_Part):
    """One guest."""

    name: str
    phase: Phase
    is_paused: bool = False
    group: str | None = None
    priority: int = 0
    source: str = Field(description="what was converted, secrets masked")
    target: str = Field(description="where it was to go, secrets masked")
    attempts: int = Field(description="how many began")
    tries: list[AttemptReport] = Field(default=[], description="each, where it is known")
    began: float | None = Field(default=None, description="seconds since the epoch")
    ended: float | None = None
    duration_s: float | None = Field(default=None, description="until now, where it goes on")
    steps_s: dict[str, float] = Field(default={}, description="by step, all attempts together")
    bytes: BytesReport = BytesReport()
    disks: list[BytesReport] = Field(default=[], description="from disk 1 on")
    rate: float | None = Field(default=None, description="bytes a second of its last copy")
    outputs: list[str] = Field(default=[], description="what was made on the target")
    failure: FailureReport | None = None
    bundle: str | None = Field(default=None, description="its failure bundle")


class Totals(_Part):
    """All guests together."""

    guests: int
    phases: dict[Phase, int] = Field(description="guests by phase; what has none is left out")
    attempts: int
    disks: int
    bytes: BytesReport
    duration_s: float | None = Field(
        default=None, description="from the first guest's begin to the last one's end, or to now"
    )
    rate: float | None = Field(default=None, description="bytes copied a second of that")


class BatchReport(_Part):
    """A batch: its guests in the order of the plan, the sums, and what to do next."""

    version: Literal[1] = 1
    run: str
    name: str = Field(description="the plan's")
    made: float = Field(description="when this report was made, seconds since the epoch")
    outcome: Literal["done", "failed", "going", "stopped"] = Field(
        description="failed: some guests; stopped: some are not done, and nobody is at work"
    )
    totals: Totals
    guests: list[GuestReport]
    next: list[str] = Field(description="what to do next, for a person")

    @property
    def failed(self) -> list[GuestReport]:
        """The guests that failed."""
        return [guest for guest in self.guests if guest.phase == "failed"]


def report_of(
    plan: Plan,
    records: Iterable[GuestRecord],
    *,
    run: str,
    now: float,
    is_going: bool = False,
    history: Mapping[str, GuestHistory] | None = None,
    attempts: Mapping[str, Sequence[AttemptRecord]] | None = None,
) -> BatchReport:
    """Return the report of a run as of ``now`` (epoch, seconds).

    ``is_going``: it has a supervisor. ``history`` and ``attempts`` are by guest, where known.
    """
    plans = {guest.name: guest for guest in plan.guests}
    known = history or {}
    guests = [
        _guest(
            plans[record.name],
            record,
            known.get(record.name, GuestHistory()),
            (attempts or {}).get(record.name, ()),
            now,
        )
        for record in records
    ]
    return BatchReport(
        run=run,
        name=plan.name,
        made=now,
        outcome=_outcome(guests, is_going=is_going),
        totals=_totals(guests, now),
        guests=guests,
        next=_next(run, guests, is_going=is_going),
    )


def as_json(report: BatchReport) -> str:
    """Return the report as JSON (``docs/schema/batch-report.json``)."""
    return report.model_dump_json(indent=2) + "\n"


# How a report is put together.


def _guest(
    plan: GuestPlan,
    record: GuestRecord,
    history: GuestHistory,
    attempts: Sequence[AttemptRecord],
    now: float,
) -> GuestReport:
    amounts = _sum(record.disks)
    failure = record.failure if record.phase not in ("done", "cancelled") else None
    return GuestReport(
        name=record.name,
        phase=record.phase,
        is_paused=record.is_paused,
        group=plan.group,
        priority=plan.priority,
        source=redact(_source(plan)),
        target=redact(_target(plan)),
        attempts=record.attempts,
        tries=[
            AttemptReport(
                number=each.number,
                began=each.began,
                ended=each.ended,
                phase=each.phase,
                failure=_failure(each.failure),
            )
            for each in attempts
        ],
        began=record.began,
        ended=record.ended,
        duration_s=_duration(record.began, record.ended, now),
        steps_s=history.steps_s,
        bytes=_bytes(amounts),
        disks=[_bytes(each) for each in record.disks],
        rate=amounts.copied / history.copy_s if history.copy_s else None,
        outputs=[redact(each) for each in record.outputs],
        failure=_failure(failure),
        bundle=history.bundle if record.phase == "failed" else None,
    )


def _source(plan: GuestPlan) -> str:
    told = plan.input.source
    sources = told if isinstance(told, str) else ", ".join(told)
    return f"{sources} ({plan.input.connection})" if plan.input.connection else sources


def _target(plan: GuestPlan) -> str:
    output = plan.output
    places = [each for each in (output.connection, output.storage) if each is not None]
    named = f" as {output.name}" if output.name else ""
    return f"{' '.join([output.type, *places])}{named}"


def _failure(failure: Failure | None) -> FailureReport | None:
    if failure is None:
        return None
    told: dict[str, Any] = {each.name: getattr(failure, each.name) for each in fields(failure)}
    told["message"] = redact(failure.message)
    told["hint"] = None if failure.hint is None else redact(failure.hint)
    return FailureReport(**told)


def _duration(began: float | None, ended: float | None, now: float) -> float | None:
    # A clock that was set back must not make it negative.
    return None if began is None else max(0.0, (now if ended is None else ended) - began)


def _sum(disks: Iterable[Bytes]) -> Bytes:
    disks = list(disks)
    return Bytes(**{each.name: sum(getattr(disk, each.name) for disk in disks) for each in _BYTES})


def _bytes(amounts: Bytes) -> BytesReport:
    return BytesReport(**{each.name: getattr(amounts, each.name) for each in _BYTES})


_BYTES = fields(Bytes)


def _totals(guests: Sequence[GuestReport], now: float) -> Totals:
    begins = [guest.began for guest in guests if guest.began is not None]
    is_over = all(guest.phase in ENDED for guest in guests)
    ends = [guest.ended for guest in guests if guest.ended is not None]
    ended = max(ends, default=now) if is_over else now
    duration = _duration(min(begins, default=None), ended, now)
    amounts = _sum(Bytes(**disk.model_dump()) for guest in guests for disk in guest.disks)
    return Totals(
        guests=len(guests),
        phases=dict(Counter(guest.phase for guest in guests)),
        attempts=sum(guest.attempts for guest in guests),
        disks=sum(len(guest.disks) for guest in guests),
        bytes=_bytes(amounts),
        duration_s=duration,
        rate=amounts.copied / duration if duration else None,
    )


def _outcome(
    guests: Sequence[GuestReport], *, is_going: bool
) -> Literal["done", "failed", "going", "stopped"]:
    if is_going:
        return "going"
    if any(guest.phase not in ENDED for guest in guests):
        return "stopped"
    return "failed" if any(guest.phase == "failed" for guest in guests) else "done"


def _next(run: str, guests: Sequence[GuestReport], *, is_going: bool) -> list[str]:
    told = []
    named = shlex.quote(run)
    left = [guest for guest in guests if guest.phase not in ENDED]
    paused = [guest for guest in left if guest.is_paused]
    failed = [guest for guest in guests if guest.phase == "failed"]
    if left and not is_going:
        told.append(f"{_count(left, 'is', 'are')} not done: v2v-async batch resume {named}")
    elif paused:
        names = " ".join(shlex.quote(guest.name) for guest in paused[:_NAMED])
        more = " …" if len(paused) > _NAMED else ""
        told.append(
            f"{_count(paused, 'is', 'are')} paused: v2v-async batch resume {named} {names}{more}"
        )
    for hint, concerned in _shared_hints(failed).items():
        names = ", ".join(guest.name for guest in concerned[:_NAMED])
        more = f" and {len(concerned) - _NAMED} more" if len(concerned) > _NAMED else ""
        told.append(f"{names}{more}: {hint}")
    if failed:
        told.append(
            f"{_count(failed, 'has', 'have')} failed: mend what is said, then v2v-async batch "
            f"resume {named} --failed; where the plan is wrong, a run of another plan"
        )
    if any(guest.bundle for guest in failed):
        told.append("to ask for help, attach a guest's failure bundle: secrets are masked in it")
    return told


_NAMED = 5
"""Names in one line: it still fits on a screen."""


def _shared_hints(failed: Iterable[GuestReport]) -> dict[str, list[GuestReport]]:
    """Return the hints that hold for several guests: to mend one thing helps them all."""
    found: dict[str, list[GuestReport]] = {}
    for guest in failed:
        if guest.failure is not None and guest.failure.hint is not None:
            found.setdefault(guest.failure.hint, []).append(guest)
    return {hint: guests for hint, guests in found.items() if len(guests) > 1}


def _count(guests: Sequence[GuestReport], one: str, several: str) -> str:
    return f"1 guest {one}" if len(guests) == 1 else f"{len(guests)} guests {several}"
