"""What a copy is asked to do, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from v2v_async.copy.endpoint import Endpoint
from v2v_async.events import Bytes

if TYPE_CHECKING:
    from v2v_async.copy.early import Early
    from v2v_async.copy.plan import Part


@dataclass(frozen=True, slots=True)
class CopyJob:
    """One disk; ``index`` is 1-based.

    ``is_known_zero``: nobody has written the target yet, it reads as zeroes. ``max_connections``
    and ``request_size`` (bytes) are what the target bears, whatever a person asks for. ``parts``:
    only these are copied. ``early``: who follows and steers it while the disk still changes.
    """

    index: int
    source: Endpoint
    target: Endpoint
    is_known_zero: bool = False
    max_connections: int | None = None
    request_size: int | None = None
    parts: tuple[Part, ...] | None = None
    early: Early | None = None


@dataclass(slots=True)
class DiskResult:
    """What has landed; ``digest`` as hexadecimal digits where one was asked for."""

    index: int
    bytes: Bytes = field(default_factory=Bytes)
    digest: str | None = None
