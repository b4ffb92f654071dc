"""Looking at hundreds of sources and targets: many at once, few at each, none for ever.

::

    place (a host, a daemon, a folder)
      first guest alone ──answers──> as many at once as the plan lets
           └─silence, or a failure that took long ──> nobody else is kept waiting for it

So a host that is down costs one deadline and one of the looks at once, however many guests are on
it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from urllib.parse import urlsplit

import anyio

from v2v_async.batch.plan.model import GroupLimits, GuestPlan, Limits
from v2v_async.batch.schedule.needs import source_host, target_name
from v2v_async.errors import SourceError, TargetError, V2VError
from v2v_async.options import InputOptions, OutputOptions
from v2v_async.output.ovirt import nfs
from v2v_async.redact import redact
from v2v_async.unwaited import run_unwaited

AT_ONCE = 16
"""In all: each may start a program or two, and a machine of two processors is not to notice."""

AT_ONCE_REMOTE = 4
"""Of one host, where the plan does not say: sshd refuses more than 10 that are logging in, and
vCenter has few sessions to give."""

DEADLINE_S = 90.0
"""For one look. libvirt and ssh have a minute for a login that is slow, then the disks follow."""

_SLOW_FAILURE_S = 10.0
"""Who says no says it sooner: what took longer is a time-out of somebody's."""

_DISKS_OF_ARGUMENT = ("disk", "ova", "vmx", "libvirtxml")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is looked at. ``at_once``: looks that it can take."""

    key: str
    shown: str
    at_once: int
    error: type[SourceError] | type[TargetError] = SourceError


class _Gate:
    """The looks at one place."""

    def __init__(self) -> None:
        self.turn = anyio.CapacityLimiter(1)
        self.silence: str | None = None


class Looks:
    """Runs looks; made for one preflight. ``deadline_s`` is for each."""

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._gates: dict[str, _Gate] = {}
        self._all = anyio.CapacityLimiter(AT_ONCE)

    async def at(
        self, place: Place, look: Callable[[], Awaitable[T]], *, is_bounded: bool = True
    ) -> T:
        """Return what ``look`` does when it has its turn; without deadline if not ``is_bounded``.

        Raises:
            SourceError, TargetError: the place has not answered, to this guest or to another.
        """
        gate = self._gates.setdefault(place.key, _Gate())
        async with gate.turn:
            if gate.silence is not None:
                raise self._silent(place, gate.silence)
            async with self._all:
                result = await self._look(place, gate, look, is_bounded)
            gate.turn.total_tokens = place.at_once
            return result

    async def _look(
        self, place: Place, gate: _Gate, look: Callable[[], Awaitable[T]], is_bounded: bool
    ) -> T:
        began = anyio.current_time()
        try:
            with anyio.fail_after(self._deadline_s if is_bounded else None):
                return await look()
        except TimeoutError:
            gate.silence = f"does not answer within {self._deadline_s:g} s"
            raise self._silent(place, gate.silence) from None
        except (V2VError, ExceptionGroup):
            if is_bounded and anyio.current_time() - began > _SLOW_FAILURE_S:
                gate.silence = "has kept another guest waiting, and was not asked again"
            else:
                gate.turn.total_tokens = place.at_once
            raise

    def _silent(self, place: Place, how: str) -> V2VError:
        return place.error(
            f"‘{place.shown}’ {how}", hint="is it up, and the way to it open? Then try again"
        )


def place_of_source(guest: GuestPlan, options: InputOptions, limits: Limits) -> Place:
    """Return where a guest's source is asked for."""
    host = source_host(guest)
    first = next(iter(options.arguments), "/")
    if host is not None:
        # Of two servers on one host, one may be dead.
        port = _port(options.connection) or _port(first)
        shown = host if port is None else f"{host}:{port}"
        return Place(f"host {shown}", shown, _at_once(limits.hosts.get(host)))
    if options.kind not in _DISKS_OF_ARGUMENT:
        shown = redact(options.connection or "libvirt")
        return Place(f"libvirt {shown}", shown, AT_ONCE_REMOTE)
    if "://" in first:
        return Place(f"address {first}", redact(first), AT_ONCE_REMOTE)
    folder = os.path.dirname(os.path.abspath(first))
    return Place(f"folder {folder}", folder, AT_ONCE)


def place_of_target(guest: GuestPlan, options: OutputOptions, limits: Limits) -> Place:
    """Return where a guest's target is asked for."""
    limit = limits.targets.get(target_name(guest))
    storage = options.storage or ""
    host = urlsplit(options.connection or "").hostname
    if host is None and nfs.is_export(storage):
        host = storage.rpartition(":/")[0]
    if host is not None:
        port = _port(options.connection)
        shown = host if port is None else f"{host}:{port}"
        return Place(f"target {shown}", shown, _at_once(limit), TargetError)
    if options.mode in ("libvirt", "glance", "openstack"):
        shown = redact(options.connection or options.mode)
        return Place(f"target {shown}", shown, _at_once(limit), TargetError)
    folder = os.path.abspath(storage)
    return Place(f"target {folder}", folder, AT_ONCE, TargetError)


def _port(address: str | None) -> int | None:
    try:
        return urlsplit(address or "").port
    except ValueError:
        return None


def _at_once(limit: GroupLimits | None) -> int:
    given = None if limit is None else limit.connections
    return min(AT_ONCE, given or AT_ONCE_REMOTE)


def local_paths(options: InputOptions) -> tuple[str, ...]:
    """Return the arguments that are files of this machine, or may be."""
    is_local = options.kind in _DISKS_OF_ARGUMENT and options.transport is None
    return tuple(each for each in options.arguments if is_local and "://" not in each)


async def touch(paths: Iterable[str]) -> None:
    """Have the file systems of some paths answer, whatever they say.

    One of a server that is away does not, and the thread that asked stays for good. Cancelled, this
    ends at once, unlike the same question from the loop's own thread.
    """
    for path in paths:
        with suppress(OSError):
            await run_unwaited(partial(os.stat, path), "stat")
