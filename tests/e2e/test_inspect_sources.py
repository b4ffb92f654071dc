"""``v2v-async inspect`` of each type of source, and its end by a signal.

What looks into the disks is a stand-in here (test_inspect.py has the appliance): it tells what the
disks hold byte for byte, so that each type is known to have been served.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import assert_gone, program, require
from tests.e2e.test_metadata_examples import SIZE, SOURCES
from tests.integration.servers import digest
from tests.vcenter import PASSWORD
from tests.waiting import wait_until
from v2v_async.model import InspectedGuest

_STAND_IN = """
import hashlib, sys
from pathlib import Path
import anyio
from v2v_async import inspection
from v2v_async.connection import connected

async def look(sockets, keys, root, environment):
    if hang:
        Path(hang).touch()
        await anyio.sleep_forever()
    held = {}
    for socket in sockets:
        async with connected(str(socket)) as connection:
            sums = hashlib.sha256()
            size = min(SIZE, connection.info.size)
            sums.update(connection.handle.read_now(size, 0))
        held[socket.name] = sums.hexdigest()
    facts = dict(type="linux", distro="debian", osinfo="debian12", arch="x86_64", root="/dev/sda1",
        major_version=12, minor_version=0, product_name="Debian", product_variant="unknown",
        package_format="deb", package_management="apt", hostname="web")
    return {"filesystems": held, "locked": [], "roots": ["/dev/sda1"], "has_esp": False,
        "system": {**facts, "mountpoints": {"/": "/dev/sda1"}}}

async def nothing(*_):
    return {}

SIZE, hang = int(sys.argv[1]), sys.argv[2]
inspection.appliance.inspect = look
# No appliance starts: whether it could be faster is not asked.
inspection.probe_kvm = inspection.emulation_environment = nothing
inspection.appliance_environment = lambda kvm: {}
from v2v_async.cli.main import main
sys.exit(main(["inspect", *sys.argv[3:]]))
"""


def argv(hang: str, *words: str) -> list[str]:
    return [sys.executable, "-c", _STAND_IN, str(SIZE), hang, *words]


@pytest.mark.parametrize("kind", SOURCES)
def test_each_type(kind: str, short_tmp: Path) -> None:
    require("qemu-img", "nbdkit")
    data = short_tmp / "data.img"
    data.write_bytes(os.urandom(SIZE))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(short_tmp / "web.qcow2"), "6G"]
    subprocess.run(create, check=True)
    held, tmp = digest(data), short_tmp / "tmp"
    tmp.mkdir()
    with SOURCES[kind](short_tmp) as (words, environment):
        done = subprocess.run(
            argv("", *words, "--json"),
            env={**os.environ, "TMPDIR": str(tmp), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = InspectedGuest.model_validate_json(done.stdout)
    contents = list(found.filesystems.values())
    assert hashlib.sha256(data.read_bytes()).hexdigest() == contents[-1]
    assert [disk.size for disk in found.disks][-1] == SIZE
    assert found.hostname == "web"
    assert PASSWORD not in done.stdout + done.stderr
    assert digest(data) == held
    assert list(tmp.iterdir()) == []
    assert_gone(str(tmp))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal(sent: signal.Signals, short_tmp: Path) -> None:
    """Nothing is left, or, after a kill -9, what ``clean`` removes."""
    require("nbdkit")
    data, tmp, begun = short_tmp / "data.img", short_tmp / "tmp", short_tmp / "begun"
    data.write_bytes(os.urandom(SIZE))
    tmp.mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp)}
    with subprocess.Popen(
        argv(str(begun), "-i", "disk", str(data)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        wait_until(begun.exists, "it looks into the disks", of=child)
        child.send_signal(sent)
        out, err = child.communicate(timeout=60)
    assert child.returncode == (-sent if sent == signal.SIGKILL else 128 + sent), out + err
    assert_gone(str(tmp), within_s=30)
    if sent == signal.SIGKILL:
        clean = [*program("v2v-async"), "clean"]
        done = subprocess.run(clean, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp.iterdir()) == []
    assert not out
