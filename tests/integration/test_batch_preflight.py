"""The preflight of a batch: real images, servers, libvirt and file systems; all told at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.conftest import assert_gone, processes_naming, require
from tests.integration.servers import MIB, serve
from v2v_async import libvirt_connection, qemu_img
from v2v_async.batch.plan.model import Plan
from v2v_async.batch.preflight.preflight import Checked, preflight_batch
from v2v_async.batch.schedule.forecast import forecast
from v2v_async.batch.schedule.needs import capacities
from v2v_async.cli.batch.plans import options_of_all
from v2v_async.events import Event, Reporter
from v2v_async.output.local import LocalOutput
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


class Batch:
    """A plan that grows, and what its preflight says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tmp, self.out, self.images = folder / "tmp", folder / "out", folder / "images"
        for path in (self.tmp, self.out, self.images):
            path.mkdir()
        self.guests: list[dict[str, Any]] = []
        self.limits: dict[str, Any] = {"scratch": "4G", "memory": "4G", "conversions": 1}
        self.windows: list[dict[str, Any]] = []
        self.events: list[Event] = []

    def image(self, name: str, *, size: int = 4 * MIB, data: int = 0) -> Path:
        """Make a raw image of which ``data`` bytes are allocated."""
        path = self.images / f"{name}.img"
        with path.open("wb") as file:
            file.write(b"x" * data)
            file.truncate(size)
        return path

    def add(self, name: str, source: str | Path | None = None, **more: Any) -> None:
        """Add a guest; its source is an image of its own where none is given."""
        given = {"type": "disk", "source": str(source or self.image(name)), "format": "raw"}
        guest: dict[str, Any] = {
            "name": name,
            "memory": "1G",
            "scratch": "64M",
            "input": given,
            "output": {"type": "local", "storage": str(self.out)},
        }
        for key, value in more.items():
            both = isinstance(value, dict) and isinstance(guest.get(key), dict)
            guest[key] = {**guest[key], **value} if both else value
        self.guests.append(guest)

    @property
    def plan(self) -> Plan:
        """It, validated."""
        return Plan.model_validate(
            {"guests": self.guests, "limits": self.limits, "windows": self.windows}
        )

    async def look(self, **more: Any) -> Checked:
        """Run the preflight."""
        plan = self.plan
        return await preflight_batch(
            plan,
            options_of_all(plan.guests),
            tmpdir=self.tmp,
            capacities=capacities(plan.limits, plan.windows, self.tmp),
            reporter=Reporter(self.events.append, "run"),
            **more,
        )


@pytest.fixture
def batch(short_tmp: Path) -> Batch:
    require("nbdkit", "qemu-nbd", "qemu-img", "virt-v2v-in-place")
    return Batch(short_tmp)


def told(checked: Checked) -> list[str]:
    return [str(problem) for problem in checked.problems]


async def test_nothing_is_wrong(batch: Batch) -> None:
    batch.add("web", batch.image("web", size=8 * MIB, data=MIB))
    batch.add("db", output={"format": "qcow2", "name": "database"})
    checked = await batch.look()
    assert told(checked) == []
    assert list(checked.facts) == ["web", "db"]
    assert checked.facts["web"].disks[0] == pytest.approx(MIB, abs=64 * 1024)
    assert checked.names == {"web": "web", "db": "database"}
    claims = {(each.guest, each.kind, each.identity) for each in checked.claims}
    assert ("web", "file", f"{batch.images}/web.img") in claims
    assert ("db", "file", f"{batch.out}/database-sda") in claims
    assert list(batch.tmp.iterdir()) == list(batch.out.iterdir()) == [], "nothing was made"
    assert "About" in "\n".join(forecast(batch.plan, checked))


async def test_five_hundred_guests_on_local_files(batch: Batch) -> None:
    for number in range(500):
        batch.add(f"g{number}")
    checked = await batch.look()
    assert told(checked) == []
    assert len(checked.facts) == 500


async def test_files_that_will_be_replaced_are_told_of(batch: Batch) -> None:
    batch.add("web")
    batch.add("db")
    for name in ("web-sda", "web.xml"):
        (batch.out / name).write_text("of an earlier conversion")
    checked = await batch.look()
    assert told(checked) == []
    [warning] = checked.warnings
    assert warning.guests == ("web",)
    assert "web-sda’ and 1 more will be replaced" in warning.message
    again = await batch.look(begun=frozenset({"web"}))
    assert again.warnings == [], "its own, by now"


async def test_ten_mistakes_are_told_at_once(batch: Batch) -> None:
    batch.add("missing", batch.images / "no.img")
    batch.add("folder", batch.images)
    empty = batch.images / "empty.img"
    empty.touch()
    batch.add("empty", empty)
    batch.add("twice1", batch.image("twice"))
    batch.add("twice2", batch.image("twice"), output={"name": "another"})
    batch.add("same1", output={"name": "same"})
    batch.add("same2", output={"name": "same"})
    batch.add("nowhere1", output={"storage": "/nonexistent"})
    batch.add("nowhere2", output={"storage": "/nonexistent"})
    batch.add("large", memory="9G")
    batch.add("closed", group="dmz")
    batch.add("nbd", "nbd+unix:///?socket=/nonexistent", input={"format": None})
    batch.add("asks", options=["--root", "ask"])
    batch.add("key", convert={"keys": ["all:file:/nonexistent"]})
    batch.limits["hosts"] = {"esx1": {"disks": 1}}
    batch.windows = [{"begin": "00:00", "end": "00:00", "group": "dmz", "conversions": 0}]
    (batch.out / "folder2-sda").mkdir()
    batch.add("folder2")
    checked = await batch.look()
    by_guest = {problem.guests: problem for problem in checked.problems}
    assert len(by_guest) == len(checked.problems) == 12
    expected = {
        ("missing",): "no.img’ can't be read: No such file",
        ("folder",): "is a directory, not a disk image",
        ("empty",): "is empty (0 bytes)",
        ("twice1", "twice2"): "they have the same source",
        ("same1", "same2"): "they would have the same target",
        ("nowhere1", "nowhere2"): "-os ‘/nonexistent’ does not exist",
        ("large",): "needs 9.0 GiB of ‘memory’, and the limit is 4.0 GiB",
        ("closed",): "the windows let no conversion of it begin",
        ("nbd",): "/nonexistent",
        ("asks",): "--root ask",
        ("key",): "--key: the file ‘/nonexistent’ can't be read",
        ("folder2",): "folder2-sda’ is a directory",
    }
    for guests, text in expected.items():
        assert text in by_guest[guests].message, guests
    hinted = [problem.guests for problem in checked.problems if problem.hint]
    assert set(by_guest) - set(hinted) == {("folder",), ("empty",)}
    # In the order of the plan.
    order = [guest["name"] for guest in batch.guests]
    firsts = [order.index(problem.guests[0]) for problem in checked.problems]
    assert firsts == sorted(firsts)
    warnings = [event.text for event in batch.events if event.type == "warning"]
    assert warnings == ["[limits.hosts.esx1] holds for no guest: they name no hosts"]
    # Those whose source opened have facts all the same.
    assert "large" in checked.facts
    assert "missing" not in checked.facts


async def test_equal_problems_are_told_once_and_targets_reached_once(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    real = LocalOutput.check

    async def check(self: LocalOutput, reporter: Reporter) -> None:
        reached.append(str(self.disks.directory))
        await real(self, reporter)

    monkeypatch.setattr(LocalOutput, "check", check)
    for number in range(20):
        batch.add(f"a{number}", output={"name": f"other{number}"})
        batch.add(f"b{number}", output={"storage": "/nonexistent"})
    checked = await batch.look()
    (problem,) = checked.problems
    assert str(problem).startswith("b0, b1, b2 and 17 more: -os ‘/nonexistent’ does not exist")
    assert Counter(reached) == {str(batch.out): 1, "/nonexistent": 1}


@contextlib.contextmanager
def silent_host() -> Iterator[int]:
    """Have a port where connections are made, and nobody ever says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_a_dead_host_does_not_hold_the_others(batch: Batch) -> None:
    with silent_host() as port:
        for number in range(40):
            batch.add(f"dead{number}", f"nbd://127.0.0.1:{port}/g{number}", input={"format": None})
            batch.add(f"alive{number}")
        began = time.monotonic()
        checked = await batch.look(deadline_s=2)
        assert time.monotonic() - began < 15
    (problem,) = checked.problems
    assert str(problem) == (
        f"dead0, dead1, dead2 and 37 more: ‘127.0.0.1:{port}’ does not answer within 2 s"
    )
    assert not problem.is_permanent
    assert list(checked.facts) == [f"alive{number}" for number in range(40)]


async def test_cancelled_it_leaves_nothing(batch: Batch) -> None:
    with silent_host() as port:
        batch.add("dead", f"nbd://127.0.0.1:{port}/", input={"format": None})
        for number in range(50):
            batch.add(f"g{number}")
        began = time.monotonic()
        with anyio.move_on_after(0.5) as scope:
            await batch.look()
        assert scope.cancelled_caught
        assert time.monotonic() - began < 5
    assert_gone(str(batch.folder))
    assert list(batch.tmp.iterdir()) == []


async def test_an_nbd_server_and_its_size(batch: Batch) -> None:
    path = batch.image("web", size=5 * MIB)
    v2vdir = V2VDir.create(batch.folder)
    async with running_servers(v2vdir) as servers:
        server = await serve(servers, "nbd", v2vdir.path, "file", str(path))
        batch.add("web", f"nbd+unix:///?socket={server.endpoint}", input={"format": None})
        checked = await batch.look()
    assert told(checked) == []
    assert checked.facts["web"].disks == (5 * MIB,)


@pytest.fixture
def small(batch: Batch) -> Iterator[Path]:
    """A file system of 16 MiB."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(batch.out)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield batch.out
    subprocess.run(["umount", str(batch.out)], check=True)


async def test_each_fits_and_all_do_not(batch: Batch, small: Path) -> None:
    for number in range(3):
        batch.add(f"g{number}", batch.image(f"g{number}", size=64 * MIB, data=6 * MIB))
    for guests, count in ((batch.guests[:2], 0), (batch.guests, 1)):
        batch.guests = guests
        checked = await batch.look()
        assert len(checked.problems) == count
    (problem,) = checked.problems
    assert problem.guests == ()
    assert f"the file system of ‘{small}’ has 16.0 MiB left" in problem.message
    assert "18.0 MiB for disks of 3 guests" in problem.message
    # What has been begun is partly there already.
    assert told(await batch.look(begun=frozenset(["g0"]))) == []


async def test_preallocated_disks_need_all_of_it(batch: Batch, small: Path) -> None:
    for number in range(3):
        image = batch.image(f"g{number}", size=7 * MIB)
        batch.add(f"g{number}", image, output={"allocation": "preallocated"})
    checked = await batch.look()
    assert ["21.0 MiB for disks of 3 guests" in text for text in told(checked)] == [True]


async def test_compressed_disks_may_do(batch: Batch, small: Path) -> None:
    for number in range(3):
        image = batch.image(f"g{number}", size=64 * MIB, data=6 * MIB)
        target = {"format": "qcow2", "options": {"compressed": True}}
        batch.add(f"g{number}", image, output=target)
    checked = await batch.look()
    assert told(checked) == []
    assert "may need 18.0 MiB" in checked.warnings[0].message


async def test_overlays_need_room_too(batch: Batch) -> None:
    batch.add("a", scratch="1T")
    batch.add("b", scratch="1T")
    batch.limits["scratch"] = "2T"
    checked = await batch.look()
    assert "2.0 TiB for overlays of 2 guests" in checked.problems[0].message
    batch.limits["scratch"] = "1G"
    checked = await batch.look()
    assert "needs 1.0 TiB of ‘scratch’, and the limit is 1.0 GiB" in checked.problems[0].message


async def test_what_was_begun_may_have_its_name(batch: Batch) -> None:
    (batch.out / "g0-sda").mkdir()
    batch.add("g0")
    batch.add("g1")
    assert len((await batch.look()).problems) == 1
    checked = await batch.look(begun=frozenset(["g0"]))
    assert told(checked) == []
    assert {each.guest for each in checked.claims} == {"g0", "g1"}, "it still is its own"
    assert len(checked.facts) == 2


async def test_only_guests_with_options_are_looked_at(batch: Batch) -> None:
    batch.add("done", batch.images / "gone.img")
    batch.add("left")
    plan = batch.plan
    checked = await preflight_batch(
        plan,
        options_of_all(plan.guests[1:]),
        tmpdir=batch.tmp,
        capacities=capacities(plan.limits, [], batch.tmp),
        reporter=Reporter(batch.events.append, "run"),
    )
    assert told(checked) == []
    assert list(checked.facts) == ["left"]


async def test_missing_programs_are_told_once(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = batch.folder / "bin"
    programs.mkdir()
    for name in ("setpriv", "nbdkit", "qemu-img", "sh"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    for name in ("a", "b", "c", "d"):
        batch.add(name)
    batch.add("broken", batch.images / "no.img")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("v2v_async.virt_v2v_in_place._DIRECTORIES", ())
    texts = told(await batch.look())
    everybody = "a, b, c and 2 more: "
    assert f"{everybody}the program ‘qemu-nbd’ is not installed" in texts
    assert any(each.startswith(everybody) and "virt-v2v-in-place" in each for each in texts)
    assert any(each.startswith("broken: ") for each in texts), "sources are looked at all the same"
    (programs / "qemu-img").unlink()
    texts = told(await batch.look())
    assert f"{everybody}the program ‘qemu-img’ is not installed" in texts
    assert not any(each.startswith("broken: ") for each in texts)


@pytest.fixture
def host(batch: Batch) -> str:
    """A libvirt of 30 guests that are off and one that runs, and a pool of images."""
    pytest.importorskip("libvirt")
    namespace = "xmlns:test='http://libvirt.org/schemas/domain/test/1.0'"
    guests = ""
    for number in range(31):
        path = batch.image(f"vm{number}")
        state = f"<test:runstate {namespace}>5</test:runstate>" if number else ""
        guests += (
            f"<domain type='test'><name>vm{number}</name><memory>65536</memory>"
            f"<os><type arch='x86_64'>hvm</type></os>{state}<devices><disk type='file' "
            f"device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
            "<target dev='vda' bus='virtio'/></disk></devices></domain>"
        )
    pool = (
        "<pool type='dir'><name>images</name><uuid>11111111-2222-3333-4444-555555555555</uuid>"
        f"<target><path>{batch.out}</path></target></pool>"
    )
    path = batch.folder / "host.xml"
    path.write_text(f"<node>{guests}{pool}</node>")
    return f"test://{path}"


async def test_guests_of_one_libvirt(
    batch: Batch, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0
    real_open, real_close = libvirt_connection._open, libvirt_connection._close

    def opened(*given: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        return real_open(*given)

    def closed(raw: Any) -> None:
        nonlocal now
        now -= 1
        real_close(raw)

    monkeypatch.setattr(libvirt_connection, "_open", opened)
    monkeypatch.setattr(libvirt_connection, "_close", closed)
    for number in range(31):
        batch.add(
            f"g{number}",
            f"vm{number}",
            input={"type": "libvirt", "connection": host, "format": None},
        )
    batch.add("gone", "vm99", input={"type": "libvirt", "connection": host, "format": None})
    checked = await batch.look()
    running, gone = checked.problems
    assert "g0: the guest ‘vm0’ is running" in str(running)
    assert "has no guest ‘vm99’" in str(gone)
    assert len(checked.facts) == 30
    assert 1 < most <= 4
    assert checked.names["g7"] == "vm7"
    claims = {(each.guest, each.kind, each.identity) for each in checked.claims}
    assert ("g7", "guest", f"{host} vm7") in claims
    assert ("g7", "file", f"{batch.images}/vm7.img") in claims


async def test_the_directory_of_a_pool_is_known(batch: Batch, host: str) -> None:
    pool = {"type": "libvirt", "connection": host, "storage": "images"}
    batch.add("a", output=pool | {"name": "new"})
    batch.add("b", output=pool | {"name": "vm3"})
    batch.add("c", output={"name": "new"})
    (batch.out / "vm4-sda").touch()
    batch.add("d", output=pool | {"name": "vm4x"})
    checked = await batch.look()
    assert [problem.guests for problem in checked.problems] == [("a", "c"), ("b",)]
    assert f"the same target, ‘{batch.out}/new-sda’" in checked.problems[0].message
    assert "has a guest ‘vm3’ already" in checked.problems[1].message
    claims = {(each.guest, each.kind, each.identity) for each in checked.claims}
    assert ("a", "guest", f"{host} new") in claims
    assert ("a", "file", f"{batch.out}/new-sda") in claims


async def test_warnings_of_many_guests_are_told_once(batch: Batch) -> None:
    path = batch.folder / "guest.xml"
    # A disk that nothing can read is left out, with a warning.
    text = (
        "<domain type='kvm'><name>{name}</name><memory>65536</memory><devices>"
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        "<source file='{image}'/><target dev='sda' bus='scsi'/></disk>"
        "<disk type='nvme' device='disk'><target dev='sdb' bus='scsi'/></disk>"
        "</devices></domain>"
    )
    for name in ("a", "b"):
        path = batch.folder / f"{name}.xml"
        path.write_text(text.format(name=name, image=batch.image(name)))
        batch.add(name, path, input={"type": "libvirtxml", "format": None})
    checked = await batch.look()
    assert told(checked) == []
    shown = [(event.guest, event.text) for event in batch.events if event.type == "warning"]
    assert len(shown) == len(checked.warnings) == 2
    assert {guest for guest, _ in shown} == {"a", "b"}, "each names its own file"


async def test_data_under_an_image_is_counted(batch: Batch) -> None:
    base = batch.image("base", size=16 * MIB, data=8 * MIB)
    tops = [batch.images / f"{name}.qcow2" for name in ("a", "b")]
    for top in tops:
        await qemu_img.create_qcow2(top, None, backing=(str(base), "raw"))
        batch.add(top.stem, top, input={"format": "qcow2"})
    checked = await batch.look()
    assert told(checked) == [], "clones may share what is under them"
    for name in ("a", "b"):
        assert 8 * MIB <= checked.facts[name].disks[0] <= 9 * MIB


async def test_passwords_are_in_nothing_that_is_told(batch: Batch) -> None:
    secret = batch.folder / "password"
    secret.write_text("hunter2\n")
    batch.add(
        "a",
        "vm",
        input={
            "type": "libvirt",
            "connection": "vpx://joe@127.0.0.1:1/DC/host",
            "password_file": str(secret),
            "format": None,
        },
    )
    checked = await batch.look()
    assert [problem.guests for problem in checked.problems] == [("a",)]
    everything = json.dumps([str(each) for each in (*checked.problems, *checked.claims)])
    everything += "".join(event.to_json() for event in batch.events)
    assert "hunter2" not in everything
    assert processes_naming("hunter2") == []
    assert os.listdir(batch.tmp) == []
