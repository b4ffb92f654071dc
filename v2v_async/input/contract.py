"""What every input does, in the order in which it is asked.

::

    parse ──> check ──> describe ──> setup
              (each may be the last: --print-source ends after describe)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from v2v_async.events import Reporter
from v2v_async.model import SourceGuest
from v2v_async.options import InputOptions
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir


class Input(ABC):
    """One kind of source. An instance belongs to one guest; construction does no I/O."""

    name: ClassVar[str]
    """As ``-i`` names it."""
    option_help: ClassVar[Mapping[str, str]] = {}
    """What ``-io ?`` lists: option to explanation."""

    @classmethod
    @abstractmethod
    def parse(cls, options: InputOptions) -> Self:
        """Check the options, without touching anything.

        Raises:
            UsageError: an option or argument is missing, unknown or wrong.
        """

    @abstractmethod
    async def check(self, reporter: Reporter) -> None:
        """Look at the source, before anything expensive begins; report all that is wrong with it.

        Raises:
            SourceError: it can't be used.
        """

    @abstractmethod
    async def describe(self) -> SourceGuest:
        """Return what is known of the guest; after :meth:`check`."""

    @abstractmethod
    async def setup(self, v2vdir: V2VDir, servers: Servers, reporter: Reporter) -> SourceGuest:
        """Start a server (``inN``) for an overlay on each disk; return the guest.

        The source is never written.

        Raises:
            SourceError, ServerStartError: a disk can't be served.
        """
