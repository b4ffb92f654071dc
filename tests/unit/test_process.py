"""Programs that we start: they end with us, at whatever moment that is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until
from v2v_async.process import start_time

_SUPERVISOR = """
import os
import sys
import anyio
from v2v_async.process import start

async def main():
    os.environ["SUPERVISOR"] = str(os.getpid())  # the program may see another parent already
    await start(["touch", sys.argv[1]], with_children=sys.argv[2] == "True")
    print("started", flush=True)
    await anyio.sleep_forever()

anyio.run(main)
"""


@pytest.mark.parametrize("with_children", [False, True])
def test_a_supervisor_that_dies_while_it_starts_a_program(
    tmp_path: Path, with_children: bool
) -> None:
    """The kernel sends no signal for a death that was before anybody asked for one."""
    program = tmp_path / "bin" / "setpriv"
    program.parent.mkdir()
    pid_file, made = tmp_path / "pid", tmp_path / "made"
    program.write_text(
        "#!/bin/sh\n"
        "while kill -0 $SUPERVISOR 2>/dev/null; do sleep 0.01; done\n"
        f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}\n"
        f'exec {shutil.which("setpriv")} "$@"\n'
    )
    program.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", _SUPERVISOR, str(made), str(with_children)],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
    ) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"started\n"
        supervisor.kill()
    wait_until(pid_file.exists, "the program begins")
    pid = int(pid_file.read_text())
    wait_until(lambda: start_time(pid) is None, "the program is gone")
    assert not made.exists()
