"""A source guest of which libvirt knows whether it runs: it is asked, and shut down."""

from __future__ import annotations

import anyio

from v2v_async.errors import SourceError
from v2v_async.libvirt_connection import SOURCE, FoundDomain, connected_as
from v2v_async.secret import Secret
from v2v_async.warm.libvirt_calls import BackupConnection

_LOOK_EVERY_S = 0.5


class WatchedGuest:
    """The guest ``name`` at the libvirt of ``uri`` (None: the local one)."""

    def __init__(self, uri: str | None, name: str, password: Secret | None = None) -> None:
        self._uri = uri
        self._name = name
        self._password = password

    async def activity(self) -> FoundDomain:
        """Return the guest as it is now.

        Raises:
            SourceError: libvirt fails, or there is no such guest.
        """
        async with connected_as(BackupConnection, self._uri, self._password, SOURCE) as connection:
            return await connection.domain(self._name)

    async def shut_down(self, within_s: float) -> None:
        """Ask the guest to shut down and wait until it is off.

        Raises:
            SourceError: it is not off in time; it may be later.
        """
        async with connected_as(BackupConnection, self._uri, self._password, SOURCE) as connection:
            found = await connection.domain(self._name)
            if found.activity == "off":
                return
            await connection.shut_down(self._name)
            with anyio.move_on_after(within_s):
                while (await connection.domain(self._name)).activity != "off":
                    await anyio.sleep(_LOOK_EVERY_S)
                return
        raise SourceError(
            f"the guest ‘{self._name}’ was asked to shut down and is not off after {within_s:g} s",
            hint="look at its console; shut it down from inside, then cutover again",
        )
