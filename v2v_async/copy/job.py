"""What a copy is asked to do, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.ranges import Ranges
from v2v_async.events import Bytes

if TYPE_CHECKING:
    from v2v_async.copy.early import Early
    from v2v_async.copy.plan import Part


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One disk; ``index`` is 1-based.

    ``is_known_zero``: nobody has written the target yet, it reads as zeroes. ``max_connections``
    and ``request_size`` (bytes) are what the target bears, whatever a person asks for. ``only``:
    the ranges to copy; the rest is right on the target and counts as resumed (None: all).
    ``parts``: the same, with what each is known to be; the rest is not counted. ``early``: who
    follows and steers the copy while the disk still changes.
    """

    index: int
    source: Endpoint
    target: Endpoint
    is_known_zero: bool = False
    max_connections: int | None = None
    request_size: int | None = None
    only: Ranges | None = None
    parts: tuple[Part, ...] | None = None
    early: Early | None = None


@dataclass(slots=True)
class DiskResult:
    """What has landed; ``digest`` as hexadecimal digits where one was asked for."""

    index: int
    bytes: Bytes = field(default_factory=Bytes)
    digest: str | None = None
