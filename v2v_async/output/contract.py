"""What every output does, in the order in which it is asked.

::

    parse ──> check ──> check_source ──> setup ──> (copy) ──> finalize
                        before convert     ├───────────┴──> abandon   when anything failed
                                           └──> reopen ──> (copy) …   in a later process
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Self

from v2v_async.errors import TargetError
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

    def why_not_early(self, source: SourceGuest, name: str) -> str | None:
        """Return why disks must not be written before the conversion is done; None: they may.

        It is for people, and goes on a sentence. Asked after :meth:`check_source`.
        """
        return None

    @abstractmethod
    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Make an empty disk and start a server (``outN``) for each of ``source.disks``.

        ``name`` is the target guest's. Before a file is made it is noted in ``state.json``
        (``V2VDir.add_output``); afterwards ``state.targets`` describes each export.
        """

    async def reopen(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Serve the disks again that an earlier process had set up and does not serve any more.

        That process may have been killed at any moment after ``setup``, in ``finalize`` too; where
        ``state.is_finalized`` says that it had come to the end of that, there is nothing to reopen.

        Return whether the disks hold what they held, so that copies can go on. False: they are new
        and empty, since some output can't do that or a disk was missing or damaged.
        ``state.targets`` says what may be taken for zero.
        """
        refuse_finalized(v2vdir)
        return await self.start_over(v2vdir, source, name, servers, reporter)

    async def start_over(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> bool:
        """Remove what was set up, and set it up anew; return False, as :meth:`reopen` does."""
        await self.abandon(v2vdir, reporter)
        # What copies remember of the disks goes before there are others.
        for path in v2vdir.path.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
        v2vdir.update(outputs=[], targets=[])
        await self.setup(v2vdir, source, name, servers, reporter)
        return False

    @abstractmethod
    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """Make the target guest from disks that are whole; their servers have been stopped.

        Uses what ``state.json`` says of the outputs: setup may have run in another process. At the
        end it says there that all is done (``is_finalized``).
        """

    @abstractmethod
    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Remove what setup and finalize made, and nothing else. Must not fail.

        Once ``state.is_finalized``, that is only what was for the way: a mount, a scratch file.
        """


def refuse_finalized(v2vdir: V2VDir) -> None:
    """See that the target guest has not been made already.

    Raises:
        TargetError
    """
    if v2vdir.state.is_finalized:
        raise TargetError(
            f"the guest of ‘{v2vdir.path}’ has been made already",
            hint="nothing is left to be done for it",
        )


@contextmanager
def reported(reporter: Reporter) -> Iterator[None]:
    """Have an error of the target's told as a warning, for what must not fail."""
    try:
        yield
    except TargetError as error:
        reporter.warning(error.message)
