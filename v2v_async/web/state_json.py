"""The JSON of ``/api/state`` and ``/api/changes``, as ``docs/schema/batch-state.json`` has it.

A reader of version 1 must survive keys, phases and outcomes that it does not know.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from v2v_async.batch.record.journal import Phase

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=0, description="bytes")]
Rate = Annotated[float, Field(ge=0, description="bytes a second")]
Seconds = Annotated[float, Field(ge=0)]
Time = Annotated[float, Field(description="seconds since the epoch")]
Outcome = Literal["finished", "failed", "cancelled"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class LimitState(_Part):
    """One limit, in its own unit: bytes for ``memory`` and ``scratch``, or else things at once."""

    taken: Count
    capacity: Count


class Moved(_Part):
    """Bytes of all disks that really have to move, as far as that is known."""

    to_move: Size
    moved: Size
    rate: Rate | None = Field(description="of all copies over some seconds; null: none is made")
    eta_s: Seconds | None = Field(description="until the run ends; null: nothing tells")


class FailureState(_Part):
    """Why a guest failed or, where another attempt follows, why the last one did."""

    text: str
    hint: str | None = Field(description="what to do next")
    step: str | None
    disk: int | None = Field(description="1-based")
    offset: int | None
    log: str | None
    permanent: bool = Field(description="it would fail the same way again")
    bundle: str | None = Field(description="the archive to attach to a report")


class DiskState(_Part):
    """One disk of a guest."""

    number: Annotated[int, Field(ge=1)]
    total: Size = Field(description="its size; 0 until it is known")
    to_move: Size = Field(description="bytes that have to move, as far as known")
    moved: Size
    rate: Rate | None
    eta_s: Seconds | None
    verified: Size | None = Field(description="bytes compared with the source after the copy")
    waits_for: str | None
    outcome: Outcome | None


class GuestState(_Part):
    """One guest."""

    name: str
    phase: Phase
    paused: bool
    running: bool = Field(description="an attempt has its turn")
    attempt: Count = Field(description="0 before the first")
    priority: int
    group: str | None
    step: str | None = Field(description="input, convert, output, copy, finalize")
    step_s: Seconds | None = Field(description="how long the step has taken")
    elapsed_s: Seconds | None = Field(description="since the first attempt began")
    waits_for: str | None = Field(description="a limit, ‘time’ or ‘paused’")
    waits_until: Time | None
    failure: FailureState | None
    disks: list[DiskState]


class BatchDocument(_Part):
    """A batch as of ``now``."""

    version: Literal[1]
    run: str | None
    name: str | None
    now: Time
    started: Time | None = Field(description="when this supervisor began")
    outcome: Outcome | None = Field(description="null while it goes on")
    paused: bool = Field(description="no guest may begin")
    warnings: Count
    counts: dict[str, Count] = Field(
        description="guests by phase, where there are any, and beside the phases ‘paused’"
    )
    waits: dict[str, Count] = Field(description="guests by what they wait for")
    disk_waits: dict[str, Count] = Field(description="disks by what they wait for")
    limits: dict[str, LimitState]
    bytes: Moved
    guests: list[GuestState] = Field(
        description="in the order of the plan; of /api/changes those that changed"
    )
