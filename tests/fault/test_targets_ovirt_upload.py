"""-o rhv-upload when something fails: what the engine had before is what it has afterwards."""

from __future__ import annotations

import shlex
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from tests.fault.test_guest_faults import STEPS, Place, kill_server, run_helpers, when
from tests.fault.test_guest_faults import place as place
from tests.integration.test_output_local import SOURCE, TARGET, reporter, write
from tests.ovirt_upload import engine as engine
from tests.ovirt_upload import imageio as imageio
from tests.ovirt_upload import output_for
from tests.ovirt_upload import own_imageio as own_imageio
from tests.services.engine import PASSWORD, Disk, Engine
from tests.services.imageio import Imageio
from v2v_async.errors import ServerError, ServerStartError, TargetError, V2VError
from v2v_async.events import Event
from v2v_async.guest import convert_guest
from v2v_async.options import (
    GuestOptions,
)
from v2v_async.output.ovirt.upload import RhvUploadOutput
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir

pytestmark = pytest.mark.anyio


@pytest.fixture
def others(engine: Engine) -> dict[str, list[str]]:
    """Somebody else's disk, which is locked at times, too."""
    path = engine.folder / "disk-theirs"
    path.write_bytes(b"theirs")
    engine.disks["theirs"] = Disk("theirs", "web-001", "theirs", "raw", 6, True, path, "ok")
    return engine.shape()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v2v_async.output.ovirt.transfers.READY_TIMEOUT_S", 1.0)
    monkeypatch.setattr("v2v_async.output.ovirt.engine_guest.IMPORT_TIMEOUT_S", 1.0)
    monkeypatch.setattr("v2v_async.output.ovirt.upload_undo.TIMEOUT_S", 10.0)


async def run(output: RhvUploadOutput, v2vdir: V2VDir, events: list[Event]) -> None:
    """What guest.py does with an output."""
    mine = reporter(events)
    try:
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, mine)
            write(v2vdir.target_socket(1), 1, 0, 4096)
        await output.finalize(v2vdir, TARGET, mine)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await output.abandon(v2vdir, mine)
        raise


def refuse(what: str, status: int, detail: str) -> Callable[[Engine], None]:
    return lambda engine: engine.fail(what, status, detail)


def lose(what: str, *, after: bool) -> Callable[[Engine], None]:
    """Lose the connection, before or after the request was carried out."""

    def prepare(engine: Engine) -> None:
        def lost() -> None:
            del engine.faults[what]  # questions are asked again
            if not after:
                raise ConnectionAbortedError
            engine.loses_answer = True

        engine.faults[what] = lost

    return prepare


def stay(phase: str, *, when_phase: str = "initializing") -> Callable[[Engine], None]:
    """Let transfers go to ``phase`` and no further, where they would leave ``when_phase``."""

    def prepare(engine: Engine) -> None:
        go_on = engine.advance

        def advance() -> None:
            held = [each for each in engine.transfers.values() if each.phase == when_phase]
            for each in held:
                each.phase = "held"
            go_on()
            for each in held:
                each.phase = phase

        engine.advance = advance

    return prepare


def illegal(engine: Engine) -> None:
    def advance() -> None:
        go_on()
        for disk in engine.disks.values():
            disk.status = "illegal" if disk.id != "theirs" else "ok"

    go_on = engine.advance
    engine.advance = advance


def vanishes(engine: Engine) -> None:
    """The engine takes a disk away that it could not make."""

    def advance() -> None:
        for disk in [each for each in engine.disks.values() if each.id != "theirs"]:
            engine.remove(disk)

    engine.advance = advance


def failing_job(engine: Engine) -> None:
    """The job fails, and the engine takes the guest away."""
    go_on = engine.advance

    def advance() -> None:
        for job in engine.jobs:
            job["status"] = "failed"
            for vm in engine.vms.values():
                for disk in vm.disks:
                    engine.disks[disk].vm = None
            engine.vms.clear()
        go_on()

    engine.advance = advance


def endless_job(engine: Engine) -> None:
    go_on = engine.advance

    def advance() -> None:
        go_on()
        for job in engine.jobs:
            job["status"] = "started"

    engine.advance = advance


def full(engine: Engine) -> None:
    engine.available = 5 << 20
    engine.fail("POST disks", 409, "Cannot add Virtual Disk. Low disk space on Storage Domain.")


FAULTS = {
    "no space": (full, "Low disk space"),
    "disk refused": (refuse("POST disks", 400, "bad"), "refuses POST disks: bad"),
    "disk: no answer": (lose("POST disks", after=True), "was lost"),
    "disk: no request": (lose("POST disks", after=False), "was lost"),
    "disk illegal": (illegal, "is ‘illegal’"),
    "disk vanishes": (vanishes, "could not make the disk"),
    "engine fails": (refuse("GET disks/*", 500, "oops"), "oops"),
    "no rights": (refuse("POST imagetransfers", 403, "not you"), "not you"),
    "transfer refused": (refuse("POST imagetransfers", 409, "locked"), "locked"),
    "transfer: no answer": (lose("POST imagetransfers", after=True), "was lost"),
    "transfer: no request": (lose("POST imagetransfers", after=False), "was lost"),
    "transfer stays": (stay("initializing"), "its phase is ‘initializing’"),
    "transfer paused": (stay("paused_system"), "its phase is ‘paused_system’"),
    "finalize refused": (refuse("POST imagetransfers/*/finalize", 409, "no"), ": no"),
    "finalize: no answer": (lose("POST imagetransfers/*/finalize", after=True), "was lost"),
    "finalize: no request": (lose("POST imagetransfers/*/finalize", after=False), "was lost"),
    "not verified": (stay("paused_system", when_phase="finalizing_success"), "‘paused_system’"),
    "guest refused": (refuse("POST vms", 409, "name is taken"), "name is taken"),
    "guest: no answer": (lose("POST vms", after=True), "was lost"),
    "guest: no request": (lose("POST vms", after=False), "was lost"),
    "job fails": (failing_job, "could not make the guest: ‘Importing VM web’ failed"),
    "job stays": (endless_job, "still being made"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_each_call_failing(
    engine: Engine, others: dict[str, list[str]], v2vdir: V2VDir, name: str
) -> None:
    prepare, message = FAULTS[name]
    prepare(engine)
    events: list[Event] = []
    with pytest.raises(TargetError, match=message) as caught:
        await run(output_for(engine), v2vdir, events)
    assert caught.value.hint
    engine.faults.clear()
    assert engine.shape() == others
    assert v2vdir.state.objects == []
    assert engine.tokens == set(), "logged out"
    texts = [event.text or "" for event in events]
    assert not any("may be left" in text for text in texts)
    # An engine that is slow may do what it was asked after we have looked.
    is_uncertain = name.startswith(("disk: no", "guest: no"))
    assert any("may still make" in text and "curl" in text for text in texts) == is_uncertain


async def test_one_disk_of_two_failing(
    engine: Engine, others: dict[str, list[str]], v2vdir: V2VDir
) -> None:
    def second() -> None:
        if sum(path.endswith("/disks") for method, path in engine.requests if method == "POST") > 1:
            engine.fail("POST disks", 409, "no more")
            engine.faults.pop("POST disks")()

    engine.faults["POST disks"] = second
    with pytest.raises(TargetError, match="no more") as caught:
        await run(output_for(engine), v2vdir, [])
    assert caught.value.disk in (1, 2)
    engine.faults.clear()
    assert engine.shape() == others


async def test_questions_are_asked_again(engine: Engine, v2vdir: V2VDir) -> None:
    """A GET whose connection is lost changes nothing: no run fails of it."""
    lose("GET disks/*", after=False)(engine)
    lose("GET jobs", after=False)(engine)
    lose("GET imagetransfers/*", after=True)(engine)
    await run(output_for(engine), v2vdir, [])
    assert len(engine.vms) == 1


async def test_what_cant_be_removed_is_listed_with_the_command(
    engine: Engine, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v2v_async.output.ovirt.upload_undo.TIMEOUT_S", 1.0)
    engine.fail("POST vms", 409, "no")
    engine.fail("DELETE disks/*", 409, "Related operation is in progress")
    events: list[Event] = []
    with pytest.raises(TargetError, match=": no"):
        await run(output_for(engine), v2vdir, events)
    left = [made.name.partition(" ")[0] for made in v2vdir.state.objects]
    assert sorted(left) == sorted(engine.disks)
    texts = [event.text or "" for event in events if "may be left" in (event.text or "")]
    for disk in engine.disks:
        [said] = {text for text in texts if disk in text}
        words = shlex.split(said.partition("remove it with: ")[2])
        assert words[0] == "curl"
        assert words[words.index("--request") + 1] == "DELETE"
        assert words[-1] == f"{engine.url}/disks/{disk}"
    assert not any(PASSWORD in text for text in texts)


async def test_an_engine_that_is_gone(
    imageio: Imageio, short_tmp: Path, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that may be left is listed; and nobody waits for long."""
    folder = short_tmp / "engine"
    folder.mkdir()
    events: list[Event] = []
    with Engine(folder, imageio) as engine:
        output = output_for(engine)
        async with running_servers(v2vdir) as servers:
            await output.setup(v2vdir, SOURCE, "web", servers, reporter(events))
    with anyio.fail_after(20):
        await output.abandon(v2vdir, reporter(events))
    texts = [event.text or "" for event in events if "may be left" in (event.text or "")]
    assert len(texts) == 4  # two disks, two transfers
    assert all("can't be reached" in text and "curl" in text for text in texts)
    assert texts[0].startswith("the oVirt image transfer"), "what locks the disks comes first"


async def test_an_engine_that_hangs(
    engine: Engine, v2vdir: V2VDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing: clean-up ends in time all the same."""
    output = output_for(engine)
    async with running_servers(v2vdir) as servers:
        await output.setup(v2vdir, SOURCE, "web", servers, reporter())
    monkeypatch.setattr("v2v_async.output.ovirt.upload_undo.TIMEOUT_S", 0.5)
    monkeypatch.setattr("v2v_async.ovirt_engine.TIMEOUT_S", 3.0)
    monkeypatch.setattr("v2v_async.output.ovirt.session._LOGOUT_S", 0.5)
    events: list[Event] = []
    with engine.lock:  # no request gets further
        began = anyio.current_time()
        await output.abandon(v2vdir, reporter(events))
        assert anyio.current_time() - began < 2.5
    texts = [event.text or "" for event in events if "may be left" in (event.text or "")]
    assert len(texts) == 4
    assert all("no answer within" in text for text in texts)
    monkeypatch.setattr("v2v_async.output.ovirt.upload_undo.TIMEOUT_S", 10.0)
    await output.abandon(v2vdir, reporter())
    assert engine.shape()["disks"] == []


async def test_somebody_elses_disk_of_the_same_id_is_left_alone(
    engine: Engine, v2vdir: V2VDir
) -> None:
    """Our request for it was lost on the way, and theirs was not."""
    theirs = "12345678-1234-1234-1234-123456789abc"
    path = engine.folder / f"disk-{theirs}"

    def overtake() -> None:
        path.write_bytes(b"theirs")
        engine.disks[theirs] = Disk(theirs, "x", "theirs", "raw", 6, True, path, "ok")
        raise ConnectionAbortedError

    engine.faults["POST disks"] = overtake
    source_ids = [("rhv-disk-uuid", theirs), ("rhv-disk-uuid", theirs[:-1] + "d")]
    with pytest.raises(TargetError, match="was lost"):
        await run(output_for(engine, *source_ids), v2vdir, [])
    assert list(engine.disks) == [theirs]
    assert path.read_bytes() == b"theirs"


async def test_imageio_cant_be_reached(
    engine: Engine, others: dict[str, list[str]], v2vdir: V2VDir
) -> None:
    engine.transfer_port = 1
    events: list[Event] = []
    with pytest.raises(ServerStartError, match="can't be reached") as caught:
        await run(output_for(engine), v2vdir, events)
    assert "rhv-proxy" in (caught.value.hint or "")
    assert engine.shape() == others
    assert not list(v2vdir.path.glob("transfer*")), "no ticket is left in a file"


async def test_imageio_is_killed_while_disks_are_written(
    own_imageio: Imageio, short_tmp: Path, v2vdir: V2VDir
) -> None:
    folder = short_tmp / "engine"
    folder.mkdir()
    events: list[Event] = []
    with Engine(folder, own_imageio) as engine:
        output = output_for(engine)
        try:
            async with running_servers(v2vdir) as servers:
                await output.setup(v2vdir, SOURCE, "web", servers, reporter(events))
                own_imageio.kill()
                own_imageio.start()
                with pytest.raises(Exception, match="returned non-zero"):
                    write(v2vdir.target_socket(1), 1, 0, 4096)
        finally:
            await output.abandon(v2vdir, reporter(events))
        assert engine.shape()["disks"] == []
    said = [event.text or "" for event in events if (event.text or "").startswith("disk 1: ")]
    assert said
    assert "imageio refuses PUT: 403" in said[0]
    assert not any(ticket in text for ticket in engine.every_ticket for text in said)


# Whole runs, the conversion replayed.


def run_options(place: Place, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> GuestOptions:
    made = output_for(engine, format="qcow2")
    monkeypatch.setattr("v2v_async.guest.parse_output", lambda options: made)
    return place.options(mode="rhv-upload")


def assert_uploaded(place: Place, engine: Engine, folder: Path) -> None:
    """Both disks, as a guest would read them, are the source's and what the conversion wrote."""
    [vm] = engine.vms.values()
    assert vm.name == "web"
    assert engine.shape()["running"] == []
    assert engine.shape()["locked"] == []
    plain = folder / "plain"
    convert = ["qemu-img", "convert", "-O", "raw", str(place.disks[1]), str(plain)]
    subprocess.run(convert, check=True)
    sources = [place.disks[0].read_bytes(), plain.read_bytes()]
    for disk, source in zip(vm.disks, sources, strict=True):
        made = engine.image(disk, folder / "made")
        assert len(made) == len(source)
        assert made[1 << 20 : (1 << 20) + 9] == b"converted"
        assert made[: 1 << 20] == source[: 1 << 20]
        assert made[2 << 20 :] == source[2 << 20 :]


def test_setup_and_final_by_the_helpers(place: Place, engine: Engine, tmp_path: Path) -> None:
    """Processes of their own, with only the v2v directory between them."""
    password = tmp_path / "password"
    password.write_text(PASSWORD)

    def made_at_the_end(words: list[str]) -> None:
        assert len(engine.vms) == (words == ["final"])

    options = ["-oc", engine.url, "-op", str(password), "-os", "data-1"]
    run_helpers(place, "rhv-upload", *options, then=made_at_the_end)
    assert_uploaded(place, engine, tmp_path)
    place.assert_nothing_left()


@pytest.mark.parametrize("step", STEPS)
async def test_cancelled_in_each_step(
    place: Place,
    engine: Engine,
    others: dict[str, list[str]],
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = run_options(place, engine, monkeypatch)
    with anyio.CancelScope() as scope:
        reporter, _ = when(step, scope.cancel)
        await convert_guest(options, reporter, tmpdir=place.tmp)
    assert scope.cancel_called
    place.assert_nothing_left()
    if step == "cleanup":  # the guest was whole before that
        assert len(engine.vms) == 1
        return
    assert engine.shape() == others
    assert engine.tokens == set()


@pytest.mark.parametrize(
    "what",
    [
        "POST disks",
        "GET disks/*",
        "POST imagetransfers",
        "GET imagetransfers/*",
        "POST imagetransfers/*/finalize",
        "POST vms",
        "GET jobs",
    ],
)
async def test_cancelled_in_each_request(
    engine: Engine, others: dict[str, list[str]], v2vdir: V2VDir, what: str
) -> None:
    """While the engine works on it: what it made all the same is removed."""
    arrived, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        del engine.faults[what]
        arrived.set()
        engine.lock.release()  # others may ask meanwhile
        try:
            go_on.wait(20)
        finally:
            engine.lock.acquire()

    engine.faults[what] = wait
    async with anyio.create_task_group() as group:

        async def cancel() -> None:
            await anyio.to_thread.run_sync(arrived.wait, 30)
            scope.cancel()
            go_on.set()

        with anyio.CancelScope() as scope:
            group.start_soon(cancel)
            await run(output_for(engine), v2vdir, [])
    assert scope.cancelled_caught
    assert engine.shape() == others
    assert v2vdir.state.objects == []


async def test_a_server_killed_in_the_copy(
    place: Place, engine: Engine, others: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options(place, engine, monkeypatch)
    reporter, _ = when("copy", lambda: kill_server(place, "out2"))
    with pytest.raises(ServerError, match="out2"):
        await convert_guest(options, reporter, tmpdir=place.tmp)
    assert engine.shape() == others
    place.assert_nothing_left()


async def test_the_engine_ends_the_transfers_in_the_copy(
    place: Place, engine: Engine, others: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an administrator may, or a timeout: the copy fails, and says what imageio said."""

    def end() -> None:
        for ticket in engine.every_ticket:
            engine.imageio.remove_ticket(ticket)

    options = run_options(place, engine, monkeypatch)
    reporter, events = when("copy", end)
    with pytest.raises(V2VError):
        await convert_guest(options, reporter, tmpdir=place.tmp)
    texts = [event.text or "" for event in events]
    assert any("imageio refuses" in text and "ended the transfer" in text for text in texts)
    assert engine.shape() == others
    place.assert_nothing_left()
