"""Rates that hold for the copies of all workers together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping

import anyio

from v2v_async.batch.cluster.placement import shares

_EVERY_S = 0.2

Send = Callable[[str, Mapping[str, int]], Awaitable[bool]]
"""Tells a worker of its rates; returns whether it has heard."""


class Rates:
    """Divides rates among workers by the copies that each has, and tells them when that changes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._rates: dict[str, int] = {}
        self._copies: dict[str, Counter[str]] = {}
        self._sent: dict[str, Mapping[str, int]] = {}
        self._has_changed = anyio.Event()

    def set(self, rates: Mapping[str, int]) -> None:
        """Limit copies (bytes a second): by group, and ``""`` is all of them."""
        self._rates = dict(rates)
        self._has_changed.set()

    def add(self, address: str) -> None:
        """Let a worker have a share."""
        self._copies[address] = Counter()
        self._has_changed.set()

    def remove(self, address: str) -> None:
        """Let the others have the share of a worker that is gone."""
        self._copies.pop(address, None)
        self._sent.pop(address, None)
        self._has_changed.set()

    def count(self, address: str, groups: Collection[str], number: int) -> None:
        """Note that a copy begins (1) or has ended (-1)."""
        counted = self._copies.get(address)
        if counted is not None:
            for group in {"", *groups}:
                counted[group] += number
            self._has_changed.set()

    async def keep_telling(self) -> None:
        """Tell the workers of every change, until cancelled."""
        while True:
            await self._has_changed.wait()
            self._has_changed = anyio.Event()
            wanted = shares(self._rates, self._copies)
            # Those who get less first: together they never have more than the rate.
            for address in sorted(wanted, key=lambda each: self._grows(each, wanted[each])):
                is_new = self._sent.get(address, {}) != wanted[address]
                if (
                    is_new
                    and address in self._copies
                    and await self._send(address, wanted[address])
                ):
                    self._sent[address] = wanted[address]
            await anyio.sleep(_EVERY_S)

    def _grows(self, address: str, after: Mapping[str, int]) -> bool:
        """Tell whether a worker's share of a rate becomes larger."""
        before = self._sent.get(address)
        if before is None:
            return True
        return any(rate > before.get(group, rate) for group, rate in after.items())
