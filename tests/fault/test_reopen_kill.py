"""A supervisor is killed with all its servers, anywhere after the conversion; another goes on.

What was converted and what has landed is not done again, the result is the same, and no file that
was there before is lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, require
from tests.integration.servers import MIB, fragmented
from tests.integration.test_input_disk import quiet
from tests.integration.test_output_local import content, reporter
from tests.integration.test_output_reopen import files, killed, reopened
from tests.waiting import wait_until
from v2v_async.copy.step import copy
from v2v_async.events import Event
from v2v_async.input.registry import parse_input
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.steps import run_input, stop_recorded
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


# In finalize.

_FINALIZE = """
import os, signal, sys
from pathlib import Path
import anyio
from tests.integration.test_output_local import TARGET, output_for, reporter
from v2v_async.output import files
from v2v_async.v2vdir import V2VDir
v2vdir, directory, left = V2VDir(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
publish = files.publish
def counted(call):
    def step(*words, **more):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*words, **more)
    return step
def publish_in_steps(*words, **more):
    for name in ("rename", "link", "unlink", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    publish(*words, **more)
files.publish = publish_in_steps
anyio.run(output_for(directory).finalize, v2vdir, TARGET, reporter())
"""


def finalize(v2vdir: V2VDir, directory: Path, steps: int) -> bool:
    """Finalize in a process that is killed after so many changes of names; True: it was not."""
    argv = [sys.executable, "-c", _FINALIZE, str(v2vdir.path), str(directory), str(steps)]
    status = subprocess.run(argv, cwd=ROOT, timeout=60).returncode
    assert status in (0, -signal.SIGKILL)
    return status == 0


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[0] != "."}


async def test_killed_in_the_middle_of_giving_names(v2vdir: V2VDir, directory: Path) -> None:
    """After each change of a name; the next process finds all as it was before, or all done."""
    earlier = {"web-sda": b"an earlier disk", "web.xml": b"an earlier guest", "web-sdc": b"mine"}
    for name, text in earlier.items():
        (directory / name).write_bytes(text)
    await killed(v2vdir, files(directory))
    steps = half_done = 0
    while not finalize(v2vdir, directory, steps):
        if v2vdir.state.is_finalized:
            break
        half_done += listing(directory) != earlier
        async with reopened(v2vdir, files(directory)):
            assert listing(directory) == earlier
            hidden = {path.name for path in directory.glob(".*")}
            assert hidden == {Path(each.temporary).name for each in v2vdir.state.outputs}
            assert len(hidden) == 2
        steps += 1
    assert steps > 6
    assert half_done >= 3
    assert v2vdir.state.is_finalized
    await files(directory).abandon(v2vdir, reporter())  # only what was for the way
    found = listing(directory)
    assert {path.name for path in directory.iterdir()} == {*earlier, "web-sdb"}
    assert found["web-sdc"] == b"mine"
    assert b"<domain" in found["web.xml"]
    assert found["web-sda"][65536:131072] == b"\1" * 65536
    assert found["web-sdb"][65536:131072] == b"\2" * 65536


@pytest.mark.parametrize("steps", [3, 4, 5, 6])
async def test_given_up_after_a_kill_there(v2vdir: V2VDir, directory: Path, steps: int) -> None:
    earlier = {"web-sda": b"an earlier disk", "web.xml": b"an earlier guest"}
    for name, text in earlier.items():
        (directory / name).write_bytes(text)
    await killed(v2vdir, files(directory))
    await stop_recorded(v2vdir)
    assert not finalize(v2vdir, directory, steps)
    await files(directory).abandon(v2vdir, reporter())
    assert listing(directory) == earlier
    assert not list(directory.glob(".*"))


# In the copy.

_RUN = """
import sys
from pathlib import Path
import anyio
from tests.integration.test_input_disk import quiet
from tests.integration.test_input_kept import convert
from v2v_async.copy import remembering
from v2v_async.copy.step import copy
from v2v_async.input.overlay import settle
from v2v_async.input.registry import parse_input
from v2v_async.options import CopyOptions, InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.steps import run_input
from v2v_async.v2vdir import V2VDir
remembering.Memory.interval_s = 0.1
async def main(v2vdir, directory, format_, *disks):
    v2vdir = V2VDir(Path(v2vdir))
    source = parse_input(InputOptions("disk", disks, options=(("overlay", "kept"),)))
    output = parse_output(OutputOptions("local", format=format_, storage=directory))
    await source.check(quiet)
    async with running_servers(v2vdir) as servers:
        guest = await run_input(v2vdir, source, servers, quiet)
        for disk in guest.disks:
            made = await convert(str(v2vdir.source_socket(disk.index)))
            (v2vdir.path / f"wanted-{disk.index}").write_bytes(made)
        await settle(v2vdir)
        await output.setup(v2vdir, guest, "web", servers, quiet)
        folder = v2vdir.path / "checkpoint"
        slow = CopyOptions(checkpoint=folder, bandwidth=8_000_000, connections=1)
        await copy(v2vdir, guest, slow, quiet)
anyio.run(main, *sys.argv[1:])
"""


def remembered(v2vdir: V2VDir) -> int:
    """Return how many disks have something in their checkpoints."""
    found = 0
    for path in (v2vdir.path / "checkpoint").glob("disk-*.json"):
        try:
            found += bool(json.loads(path.read_text())["record"]["done"]["steps"])
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_killed_in_the_copy(
    v2vdir: V2VDir, directory: Path, short_tmp: Path, tmp_path: Path, format_: str
) -> None:
    raw = fragmented(short_tmp / "web.img", 24 * MIB)
    with raw.open("r+b") as file:  # enough for a copy to be in its middle
        file.write(os.urandom(20 * MIB))
    other = short_tmp / "data.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(other)], check=True)
    disks = (str(raw), str(other))
    argv = [sys.executable, "-c", _RUN, str(v2vdir.path), str(directory), format_, *disks]
    with subprocess.Popen(argv, cwd=ROOT) as run:
        try:
            wait_until(lambda: remembered(v2vdir) == 2, "both disks are in their middle", of=run)
        finally:
            # Servers first: they would end politely when they hear of the supervisor's death. It
            # stands still meanwhile: it ends all of them when one is gone.
            run.send_signal(signal.SIGSTOP)
            for record in v2vdir.state.processes:
                os.kill(record.pid, signal.SIGKILL)
            run.kill()
    wanted = [(v2vdir.path / f"wanted-{index}").read_bytes() for index in (1, 2)]
    await stop_recorded(v2vdir)

    source = parse_input(InputOptions("disk", disks, options=(("overlay", "kept"),)))
    output = parse_output(OutputOptions("local", format=format_, storage=str(directory)))
    await source.check(quiet)
    events: list[Event] = []
    async with running_servers(v2vdir) as servers:
        guest = await run_input(v2vdir, source, servers, quiet)
        assert await output.reopen(v2vdir, guest, "web", servers, quiet)
        options = CopyOptions(checkpoint=v2vdir.path / "checkpoint")
        results = await copy(v2vdir, guest, options, reporter(events).for_step("copy"))
        made = [Path(each.temporary) for each in v2vdir.state.outputs]
    assert [content(path, format_, tmp_path) for path in made] == wanted
    assert all(result.resumed > 0 for result in results)
    assert all(result.total == 24 * MIB for result in results)
    await output.abandon(v2vdir, reporter())
    assert list(directory.iterdir()) == []
