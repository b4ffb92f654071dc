"""``-o null``: everything but the result. What is copied goes nowhere."""

from __future__ import annotations

from typing import Self

from v2v_async import nbdkit
from v2v_async.errors import UsageError
from v2v_async.events import Reporter
from v2v_async.model import SourceGuest, TargetGuest
from v2v_async.options import OutputOptions
from v2v_async.output.contract import Output
from v2v_async.server import Servers
from v2v_async.v2vdir import TargetExport, V2VDir


class NullOutput(Output):
    """Serves disks that forget what is written."""

    name = "null"

    @classmethod
    def parse(cls, options: OutputOptions) -> Self:
        """Refuse what virt-v2v refuses: a place to write to, and options of other outputs."""
        if options.storage is not None:
            raise UsageError("-o null takes no -os: nothing is written")
        if options.password is not None:
            raise UsageError("-o null takes no -op")
        if options.options:
            raise UsageError(f"-o null has no option ‘-oo {options.options[0][0]}’")
        return cls()

    async def check(self, reporter: Reporter) -> None:
        """Check that nbdkit has the plugin."""
        (await nbdkit.probe()).require(plugin="null")

    async def setup(
        self, v2vdir: V2VDir, source: SourceGuest, name: str, servers: Servers, reporter: Reporter
    ) -> None:
        """Start a null server for each disk."""
        features = await nbdkit.probe()
        for disk in source.disks:
            command = nbdkit.serve_null(features, disk.size, v2vdir.target_socket(disk.index))
            log = v2vdir.log("output", disk.index)
            await servers.start(f"out{disk.index}", command, log=log)
        # Zeroes need not even be sent: what nobody keeps is as zero as what was never written.
        v2vdir.update(
            targets=[TargetExport(index=disk.index, is_known_zero=True) for disk in source.disks]
        )

    # reopen is what every output has: nothing is held, so that all is copied again.

    async def finalize(self, v2vdir: V2VDir, target: TargetGuest, reporter: Reporter) -> None:
        """There is no guest to make."""
        v2vdir.update(is_finalized=True)

    async def abandon(self, v2vdir: V2VDir, reporter: Reporter) -> None:
        """Do nothing: nothing was made."""
