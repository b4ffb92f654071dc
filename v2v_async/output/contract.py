"""What every output does, in the order in which it is asked.

::

    parse ──> check ──> check_source ──> setup ──> (copy) ──> finalize
                        before convert     └───────────┴──> abandon   when anything failed
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.server import Servers
from v2v_async.v2vdir import V2VDir


class Output(ABC):
    """One kind of target. An instance belongs to one guest; construction does no I/O."""

    name: ClassVar[str]
    """As ``-o`` names it."""
    option_help: ClassVar[Mapping[str, str]] = {}
    """What ``-oo ?`` lists: option to explanation."""

    @classmethod
    @abstractmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Check the options, without touching anything.

        Raises:
            UsageError: an option is missing, unknown or wrong.
        """

    @abstractmethod
    async def check(self, reporter: Reporter) -> None:
        """Reach the target, before anything expensive begins.

        Raises:
            TargetError, UsageError: it can't be used.
        """

    async def check_source(  # noqa: B027 - most outputs have nothing to check here
        self, source: SourceGuest, name: str, reporter: Reporter
    ) -> None:
        """Check what can only be known with the source at hand, before it is converted.

        ``name`` is the target guest's. ``setup`` repeats it, for helpers that run alone.

        Raises:
            TargetError, UsageError: this guest can't be made there.
        """

    @abstractmethod
    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make an empty disk and start a server (``outN``) for each of ``source.disks``.

        ``name`` is the target guest's. Before a file is made it is noted in ``state.json``
        (``V2VDir.add_output``); afterwards ``state.targets`` describes each export.
        """

    @abstractmethod
    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Make the target guest from disks that are whole; their servers have been stopped.

        Uses what ``state.json`` says of the outputs: setup may have run in another process.
        """

    @abstractmethod
    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what setup and finalize made, and nothing else. Must not fail."""
