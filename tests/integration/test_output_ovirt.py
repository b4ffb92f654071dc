"""-o rhv and -o vdsm with real servers: the layout, who owns it, and what is left when it fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from lxml import etree

from tests.conftest import require
from tests.integration.test_output_local import (
    SIZE,
    SOURCE,
    TARGET,
    content,
    expected,
    reporter,
    write,
)
from v2v_async.clean import clean
from v2v_async.errors import ServerStartError, TargetError, UsageError, V2VError
from v2v_async.events import Event
from v2v_async.options import OutputOptions
from v2v_async.output import files
from v2v_async.output.contract import Output
from v2v_async.output.registry import parse_output
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio
RECORDED = Path(__file__).parent.parent / "recorded" / "ovirt"
DOMAIN = "4e6a7b1c-0d2f-4a61-9b4e-1f0a6f7b2c11"
IMAGES = ["11111111-1111-1111-1111-111111111111", "11111111-1111-1111-1111-111111111112"]
VOLUMES = ["22222222-2222-2222-2222-222222222221", "22222222-2222-2222-2222-222222222222"]
VM = "33333333-3333-3333-3333-333333333333"
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("nbdkit", "qemu-nbd", "qemu-img", "qemu-io")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export domain, with somebody else's guest in it."""
    domain = tmp_path / "export" / DOMAIN
    (domain / "dom_md").mkdir(parents=True)
    (domain / "dom_md" / "metadata").write_text(f"CLASS=Backup\nSDUUID={DOMAIN}\n")
    other = domain / "images" / IMAGES[0]
    other.mkdir(parents=True)
    (other / VOLUMES[0]).write_text("somebody else's")
    (domain / "master" / "vms").mkdir(parents=True)
    if IS_ROOT:
        for path in [domain, *domain.rglob("*")]:
            os.chown(path, 36, 36)
    return domain.parent


def tree(folder: Path) -> list[str]:
    """One line for everything below ``folder``: type, mode, owner, path; times do not matter."""
    rows = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = "d" if path.is_dir() else "f"
        owner = f"{status.st_uid}:{status.st_gid}"
        rows.append(f"{kind} {status.st_mode & 0o777:o} {owner} {path.relative_to(folder)}")
    return rows


def shape(rows: list[str]) -> list[str]:
    return sorted(re.sub(UUID, "UUID", row) for row in rows)


def rhv(export: Path | str, **fields: Any) -> Output:
    return parse_output(OutputOptions(**{"mode": "rhv", "storage": str(export), **fields}))


def vdsm(export: Path, **fields: Any) -> Output:
    options = [("vdsm-vm-uuid", VM), ("vdsm-ovf-output", str(export / "ovf"))]
    for image, volume in zip(IMAGES, VOLUMES, strict=True):
        options += [("vdsm-image-uuid", image), ("vdsm-vol-uuid", volume)]
        (export / DOMAIN / "images" / image).mkdir(exist_ok=True)
    options += fields.pop("more", [])
    (export / "ovf").mkdir(exist_ok=True)
    return parse_output(
        OutputOptions(mode="vdsm", storage=str(export / DOMAIN), options=tuple(options), **fields)
    )


OUTPUTS: dict[str, Callable[..., Output]] = {"rhv": rhv, "vdsm": vdsm}


async def set_up(v2vdir: V2VDir, output: Output, name: str = "web") -> None:
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, name, servers, reporter())
        for disk in SOURCE.disks:
            await anyio.to_thread.run_sync(
                write, v2vdir.target_socket(disk.index), disk.index, 65536, 65536
            )


async def make(
    v2vdir: V2VDir, output: Output, name: str = "web", events: list[Event] | None = None
) -> None:
    """Run an output from check to finalize; another instance finalizes, as in a helper."""
    await output.check(reporter(events))
    await output.check_source(SOURCE, name, reporter())
    await set_up(v2vdir, output, name)
    target = TARGET.model_copy(update={"name": name})
    await output.finalize(V2VDir(v2vdir.path), target, reporter(events))


@pytest.mark.parametrize("allocation", ["sparse", "preallocated"])
@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_the_layout_is_virt_v2vs(
    v2vdir: V2VDir, export: Path, tmp_path: Path, format_: str, allocation: str
) -> None:
    before = tree(export)
    events: list[Event] = []
    output = rhv(export, format=format_, allocation=allocation)
    await output.check(reporter(events))
    await set_up(v2vdir, output)
    again = rhv(export, format=format_, allocation=allocation)
    await again.finalize(V2VDir(v2vdir.path), TARGET, reporter(events))

    made = [row for row in tree(export) if row not in before]
    theirs = (RECORDED / "rhv.layout").read_text().splitlines()
    if not IS_ROOT:
        own = f"{os.geteuid()}:{os.getegid()}"
        theirs = [row.replace("36:36", own) for row in theirs]
    assert shape(made) == shape(theirs)
    # With one exception: who is not root is told that oVirt can't read these files.
    assert [event.type for event in events] == (["message"] if IS_ROOT else ["warning", "message"])

    (ovf_path,) = export.glob(f"{DOMAIN}/master/vms/*/*.ovf")
    assert ovf_path.stem == ovf_path.parent.name
    root = etree.parse(ovf_path).getroot()
    volumes = [str(element.get(f"{{{root.nsmap['ovf']}}}href")) for element in root.iter("File")]
    assert len(volumes) == 2
    for index, volume in enumerate(volumes, 1):
        path = export / DOMAIN / "images" / volume
        assert content(path, format_, tmp_path) == expected(index)
        assert (path.stat().st_blocks * 512 >= SIZE) == (allocation == "preallocated")
        meta = dict(
            line.split("=", 1)
            for line in path.with_name(f"{path.name}.meta").read_text().splitlines()
            if "=" in line
        )
        assert meta["IMAGE"] == path.parent.name
        assert (meta["DOMAIN"], meta["SIZE"]) == (DOMAIN, str(SIZE // 512))
        assert meta["FORMAT"] == {"raw": "RAW", "qcow2": "COW"}[format_]
        assert meta["TYPE"] == allocation.upper()
        said = root.findall(".//Disk")[index - 1].attrib
        assert said[f"{{{root.nsmap['ovf']}}}volume-type"] == allocation.capitalize()
    assert v2vdir.state.objects == []


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_vdsm_gets_what_it_named_and_earlier_files_are_replaced_at_the_end(
    v2vdir: V2VDir, export: Path, tmp_path: Path, compat: str
) -> None:
    output = vdsm(export, format="qcow2", more=[("vdsm-compat", compat)])
    first = export / DOMAIN / "images" / IMAGES[0] / VOLUMES[0]
    await output.check(reporter())
    await set_up(v2vdir, output)
    assert first.read_text() == "somebody else's"
    again = vdsm(export, format="qcow2", more=[("vdsm-compat", compat)])
    await again.finalize(V2VDir(v2vdir.path), TARGET, reporter())
    for index, (image, volume) in enumerate(zip(IMAGES, VOLUMES, strict=True), 1):
        folder = export / DOMAIN / "images" / image
        assert sorted(os.listdir(folder)) == [volume, f"{volume}.meta"]
        assert content(folder / volume, "qcow2", tmp_path) == expected(index)
        assert (folder / volume).stat().st_mode & 0o777 == 0o644
        if IS_ROOT:
            assert (folder / volume).stat().st_uid == 36
    info = subprocess.run(["qemu-img", "info", str(first)], capture_output=True, text=True)
    assert f"compat: {compat}" in info.stdout
    assert os.listdir(export / "ovf") == [f"{VM}.ovf"]
    assert 'ovf:id="out"' in (export / "ovf" / f"{VM}.ovf").read_text()


async def test_vdsm_refuses_what_does_not_fit(v2vdir: V2VDir, export: Path) -> None:
    output = vdsm(export)
    one = SOURCE.model_copy(update={"disks": SOURCE.disks[:1]})
    with pytest.raises(UsageError, match="has 1 disks, and -oo names 2 images"):
        await output.check_source(one, "web", reporter())
    final = export / DOMAIN / "images" / IMAGES[0] / VOLUMES[0]
    final.unlink()
    final.symlink_to("/dev/null")
    with pytest.raises(TargetError, match="is no file"):
        await output.check_source(SOURCE, "web", reporter())
    (export / DOMAIN / "images" / IMAGES[1]).rmdir()
    with pytest.raises(TargetError, match=r"image folder .* is not there"):
        await output.check(reporter())
    (export / DOMAIN / "images" / IMAGES[1]).mkdir()
    (export / "ovf").rmdir()
    with pytest.raises(UsageError, match="vdsm-ovf-output"):
        await output.check(reporter())
    wrong = parse_output(
        OutputOptions(
            mode="vdsm",
            storage=str(export),
            options=(
                ("vdsm-image-uuid", IMAGES[0]),
                ("vdsm-vol-uuid", VOLUMES[0]),
                ("vdsm-vm-uuid", VM),
            ),
        )
    )
    with pytest.raises(UsageError, match="is not the folder of a storage domain"):
        await wrong.check(reporter())


@pytest.mark.parametrize("name", ["../../escaped", 'we<b> & "$(id)"', "x" * 300, "café 😀"])
@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_hostile_names(
    v2vdir: V2VDir, export: Path, tmp_path: Path, name: str, mode: str
) -> None:
    await make(v2vdir, OUTPUTS[mode](export), name)
    (ovf_path,) = [*export.glob("ovf/*.ovf"), *export.glob(f"{DOMAIN}/master/vms/*/*.ovf")]
    assert etree.parse(ovf_path).getroot().findtext(".//Name") == name
    assert sorted(os.listdir(tmp_path)) == ["export"]


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "", " "])
@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_impossible_names(v2vdir: V2VDir, export: Path, name: str, mode: str) -> None:
    output = OUTPUTS[mode](export)
    before = tree(export)
    with pytest.raises(UsageError, match="can't be the name"):
        await set_up(v2vdir, output, name)
    assert tree(export) == before


# Nothing half-made.


@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_abandoned_after_setup_by_another_process(
    v2vdir: V2VDir, export: Path, mode: str
) -> None:
    output = OUTPUTS[mode](export)
    before = tree(export)
    await set_up(v2vdir, output)
    assert tree(export) != before
    events: list[Event] = []
    await OUTPUTS[mode](export).abandon(V2VDir(v2vdir.path), reporter(events))
    assert tree(export) == before
    await output.abandon(v2vdir, reporter(events))
    assert events == []


# Where each is stopped: a function that every run comes through, and at which call.
POINTS = [
    ("v2v_async.output.files.make_empty", 1),
    ("v2v_async.output.files.make_empty", 2),
    ("v2v_async.output.files.make_raw", 2),
    ("v2v_async.server.Servers.start", 1),
    ("v2v_async.server.Servers.start", 2),
    # From here on in finalize.
    ("v2v_async.output.files.make_empty", 3),
    ("v2v_async.output.files.make_empty", 5),
    ("v2v_async.output.files.sync", 1),
    ("v2v_async.output.files.sync", 5),
]


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0].split('.')[-1]}-{point[1]}")
@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_stopped_on_the_way(
    v2vdir: V2VDir,
    export: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    point: tuple[str, int],
    how: str,
) -> None:
    name, at = point
    attribute = name.rpartition(".")[2]
    original: Any = {
        "make_empty": files.make_empty,
        "make_raw": files.make_raw,
        "sync": files.sync,
    }.get(attribute)
    if original is None:
        from v2v_async.server import Servers

        original = Servers.start
    output = OUTPUTS[mode](export)
    before = tree(export)
    scope = anyio.CancelScope()
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            if how == "fails":
                raise TargetError("made to fail")
            scope.cancel()

    if attribute == "make_empty":

        def stopping(path: Path) -> None:
            files_make_empty(path)
            stop()

        files_make_empty = files.make_empty
        monkeypatch.setattr(name, stopping)
    else:

        async def stopping_later(*arguments: Any, **named: Any) -> None:
            stop()
            await anyio.lowlevel.checkpoint()
            await original(*arguments, **named)

        monkeypatch.setattr(name, stopping_later)
    with scope, suppress(TargetError):
        await set_up(v2vdir, output)
        await output.finalize(v2vdir, TARGET, reporter())
        pytest.fail("it should have been stopped")
    assert calls >= at
    events: list[Event] = []
    await OUTPUTS[mode](export).abandon(V2VDir(v2vdir.path), reporter(events))
    assert tree(export) == before
    assert events == []


@pytest.mark.parametrize("at", [1, 2, 4, 5])
@pytest.mark.parametrize("mode", ["rhv", "vdsm"])
async def test_a_rename_that_fails(
    v2vdir: V2VDir, export: Path, monkeypatch: pytest.MonkeyPatch, mode: str, at: int
) -> None:
    output = OUTPUTS[mode](export)
    before = tree(export)
    await set_up(v2vdir, output)
    calls = 0
    rename = os.rename

    def failing(source: Any, destination: Any) -> None:
        nonlocal calls
        if ".partial" in str(source):
            calls += 1
            if calls == at:
                raise OSError(5, "made to fail")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(TargetError, match="made to fail"):
        await output.finalize(v2vdir, TARGET, reporter())
    assert calls == at
    await output.abandon(v2vdir, reporter())
    assert tree(export) == before


async def test_a_server_that_does_not_start(v2vdir: V2VDir, export: Path) -> None:
    output = rhv(export)
    before = tree(export)
    v2vdir.target_socket(2).mkdir()
    with pytest.raises((ServerStartError, OSError, V2VError)):
        await set_up(v2vdir, output)
    await output.abandon(v2vdir, reporter())
    assert tree(export) == before


async def test_what_somebody_put_into_our_folder_stays_and_is_told(
    v2vdir: V2VDir, export: Path
) -> None:
    output = rhv(export)
    await set_up(v2vdir, output)
    folder = Path(v2vdir.state.objects[0].name)
    (folder / "not ours").touch()
    events: list[Event] = []
    await output.abandon(v2vdir, reporter(events))
    assert [path.name for path in folder.iterdir()] == ["not ours"]
    (event,) = events
    assert event.type == "warning"
    assert f"rmdir {folder}" in (event.text or "")


async def test_clean_after_a_killed_run(v2vdir: V2VDir, export: Path) -> None:
    before = tree(export)
    await set_up(v2vdir, rhv(export))
    copied = v2vdir.path.with_name("v2v.dead")
    shutil.copytree(v2vdir.path, copied)
    dead = V2VDir(copied)
    dead.update(owner=None)
    events: list[Event] = []
    await clean([copied], reporter(events))
    # The folders are empty, and named with the command that removes them.
    undo = [event.text or "" for event in events if event.type == "warning"]
    assert len(undo) == 2
    for text in undo:
        subprocess.run(text.partition("undo it with: ")[2], shell=True, check=True)
    assert tree(export) == before


async def test_finalize_needs_what_setup_made(v2vdir: V2VDir, export: Path) -> None:
    for mode, match in (("rhv", "setup made 0 disks"), ("vdsm", "not among the outputs")):
        output = OUTPUTS[mode](export)
        before = tree(export)
        with pytest.raises(TargetError, match=match):
            await output.finalize(v2vdir, TARGET, reporter())
        assert tree(export) == before


@pytest.mark.skipif(not IS_ROOT, reason="needs root")
async def test_made_as_36_where_root_is_not_let(
    v2vdir: V2VDir, short_tmp: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an export that squashes root: there chown fails, and only 36:36 may write."""
    place = short_tmp / "export"
    subprocess.run(["cp", "-a", str(export), str(place)], check=True)
    short_tmp.chmod(0o711)
    before = tree(place)
    chown = os.chown

    def squashed(path: Any, uid: int, gid: int, **named: Any) -> None:
        if str(path).startswith(str(place)):
            raise PermissionError(1, "Operation not permitted")
        chown(path, uid, gid, **named)

    monkeypatch.setattr(os, "chown", squashed)
    await make(v2vdir, rhv(place))
    made = [row for row in tree(place) if row not in before]
    assert shape(made) == shape((RECORDED / "rhv.layout").read_text().splitlines())


# NFS: mount is a stand-in that binds a directory, everything else is real.


@pytest.fixture
def fake_nfs(export: Path, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds what the stand-in was asked; TMPDIR is short_tmp."""
    if not IS_ROOT:
        pytest.skip("needs root")
    trial = short_tmp / "trial"
    trial.mkdir()
    if subprocess.run(["mount", "--bind", str(export), str(trial)]).returncode != 0:
        pytest.skip("needs the right to mount")
    subprocess.run(["umount", str(trial)], check=True)
    trial.rmdir()
    tools = short_tmp / "bin"
    tools.mkdir()
    real = shutil.which("mount")
    (tools / "mount").write_text(
        f"""#!/bin/sh
echo "$@" >> {tools}/asked
[ "$4" = server:/export ] || {{ echo "mount.nfs: access denied" >&2; exit 32; }}
exec {real} --bind {export} "$5"
"""
    )
    (tools / "mount").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(short_tmp))
    yield tools
    for line in mounts(short_tmp):  # never remove the folder above something mounted
        subprocess.run(["umount", line.split()[1]], check=True)


def mounts(folder: Path) -> list[str]:
    return [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]


async def test_an_export_is_mounted_for_the_run(
    fake_nfs: Path, v2vdir: V2VDir, export: Path, short_tmp: Path
) -> None:
    before = tree(export)
    output = rhv("server:/export")
    await output.check(reporter())
    await output.check_source(SOURCE, "web", reporter())
    assert mounts(short_tmp) == []
    await set_up(v2vdir, output)
    assert len(mounts(short_tmp)) == 1
    assert not mounts(v2vdir.path), "what is removed with the run must not hold an export"
    await rhv("server:/export").finalize(V2VDir(v2vdir.path), TARGET, reporter())
    assert mounts(short_tmp) == []
    assert not list(short_tmp.glob("v2v-export.*"))
    made = [row for row in tree(export) if row not in before]
    assert shape(made) == shape((RECORDED / "rhv.layout").read_text().splitlines())
    asked = (fake_nfs / "asked").read_text().splitlines()
    assert len(asked) == 3
    assert all(line.startswith("-t nfs -- server:/export ") for line in asked)


async def test_an_export_is_unmounted_when_it_fails(
    fake_nfs: Path, v2vdir: V2VDir, export: Path, short_tmp: Path
) -> None:
    before = tree(export)
    await set_up(v2vdir, rhv("server:/export"))
    with anyio.CancelScope() as scope:
        scope.cancel()
        await rhv("server:/export").abandon(V2VDir(v2vdir.path), reporter())
    assert mounts(short_tmp) == []
    assert not list(short_tmp.glob("v2v-export.*"))
    assert tree(export) == before
    assert v2vdir.state.objects == []


async def test_an_export_that_is_refused(fake_nfs: Path, v2vdir: V2VDir, short_tmp: Path) -> None:
    output = rhv("other:/export")
    with pytest.raises(TargetError, match="access denied") as caught:
        await output.check(reporter())
    assert "needs root" in (caught.value.hint or "")
    with pytest.raises(TargetError, match="access denied"):
        await set_up(v2vdir, output)
    await output.abandon(v2vdir, reporter())
    assert not list(short_tmp.glob("v2v-export.*"))


async def test_an_export_that_is_busy_stays_and_is_told(
    fake_nfs: Path, v2vdir: V2VDir, export: Path, short_tmp: Path
) -> None:
    output = rhv("server:/export")
    await set_up(v2vdir, output)
    (point,) = short_tmp.glob("v2v-export.*")
    events: list[Event] = []
    with (point / DOMAIN / "dom_md" / "metadata").open():
        await output.abandon(v2vdir, reporter(events))
    (event,) = events
    assert f"umount {point} && rmdir {point}" in (event.text or "")
    assert (export / DOMAIN / "dom_md" / "metadata").exists()
    await output.abandon(v2vdir, reporter())
    assert mounts(short_tmp) == []


async def test_the_room_is_looked_at_before(export: Path) -> None:
    huge = SOURCE.model_copy(
        update={"disks": [SOURCE.disks[0].model_copy(update={"size": 1 << 60})]}
    )
    output = rhv(export, allocation="preallocated")
    with pytest.raises(TargetError, match="preallocated disks need"):
        await output.check_source(huge, "web", reporter())
    odd = SOURCE.model_copy(update={"disks": [SOURCE.disks[0].model_copy(update={"size": 1000})]})
    with pytest.raises(TargetError, match="1000 bytes"):
        await rhv(export).check_source(odd, "web", reporter())
