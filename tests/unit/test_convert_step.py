"""The convert step with a stand-in for virt-v2v-in-place: events, errors, secrets, cancellation."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from lxml import etree

from tests.waiting import until
from v2v_async import process
from v2v_async.convert import convert
from v2v_async.convert.hints import hint_for
from v2v_async.convert.secrets import secret_files
from v2v_async.convert.source_xml import source_xml
from v2v_async.errors import ConversionError, UsageError
from v2v_async.events import Event, Reporter
from v2v_async.model import Nic, SourceDisk, SourceGuest
from v2v_async.options import ConvertOptions, MacMapping, NetworkOptions
from v2v_async.v2vdir import V2VDir

RECORDED = Path(__file__).parent / "recorded"

SOURCE = SourceGuest(
    name="we<b> & co",
    memory=1 << 30,
    vcpus=2,
    features=["acpi", "../evil"],
    disks=[
        SourceDisk(index=1, source="/a", format="raw", size=1 << 20),
        SourceDisk(index=2, source="/b", format="raw", size=1 << 20),
    ],
    nics=[Nic(mac="52:54:00:00:00:01", vnet="old")],
)

# What the real one does, as far as the step can see it. BODY is put in.
FAKE = """#!/bin/sh
case $1 in
--version) echo virt-v2v-in-place {version}; exit ;;
--long-options) echo --key; exit ;;
--machine-readable) echo {words}; exit ;;
esac
{body}
"""


@pytest.fixture
def v2vdir(tmp_path: Path) -> Iterator[V2VDir]:
    # A short path: sockets are made under it.
    made = V2VDir.create(Path("/tmp"))
    yield made
    made.remove()


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a stand-in first into the PATH."""

    def put(body: str, version: str = "2.2.0", words: str = "io") -> None:
        program = tmp_path / "bin" / "virt-v2v-in-place"
        program.parent.mkdir(exist_ok=True)
        program.write_text(FAKE.format(body=body, version=version, words=words))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return put


async def run(
    v2vdir: V2VDir, options: ConvertOptions | None = None, name: str | None = None
) -> list[Event]:
    events: list[Event] = []
    reporter = Reporter(events.append, "run").for_guest("g").for_step("convert")
    await convert(v2vdir, SOURCE, options or ConvertOptions(), name, {}, reporter)
    return events


def play(name: str) -> str:
    return f"cat {RECORDED}/{name}.stdout\ncat {RECORDED}/{name}.stderr >&2"


@pytest.mark.anyio
async def test_a_recorded_run_becomes_events_a_log_and_metadata(
    v2vdir: V2VDir, install: Install
) -> None:
    install(play("v2v-2.2-windows"))
    networks = NetworkOptions(networks=((None, "new"),))
    events = await run(v2vdir, ConvertOptions(network=networks), "renamed")
    assert [event.type for event in events] == [
        "message",
        "message",
        "warning",
        "message",
        "message",
    ]
    assert events[1].text == "Opening the source"
    assert "no virtio drivers" in (events[2].text or "")
    target = v2vdir.read_target()
    assert target.name == "renamed"
    assert target.firmware == "bios"
    assert target.inspection.osinfo == "win2k22"
    assert target.buses.sata == [1, 2]
    assert target.boot_disk == 1
    assert target.nics[0].vnet == "new"
    log = v2vdir.log("convert").read_text()
    assert log.startswith("$ ")
    assert "gcaps_block_bus = ide" in log
    assert "[   2.0] Opening the source" in log
    assert '"message"' not in log, "each message is there once"
    assert v2vdir.state.processes == []


@pytest.mark.anyio
async def test_what_dash_o_writes_is_used_where_it_can_write(
    v2vdir: V2VDir, install: Install
) -> None:
    body = f"""
while [ "$1" != -O ]; do shift; done
cp {RECORDED}/v2v-2.10-linux.inspector.xml "$2"
sed -i s/bios/uefi/ "$2"
grep gcaps_ {RECORDED}/v2v-2.10-linux.stderr >&2
"""
    install(body, version="2.10.0", words="io output-xml-option")
    await run(v2vdir)
    target = v2vdir.read_target()
    assert target.firmware == "uefi"
    assert target.inspection.distro == "debian"
    assert target.buses.virtio_blk == [1, 2]


@pytest.mark.anyio
async def test_a_failure_names_phase_cause_log_and_what_to_do(
    v2vdir: V2VDir, install: Install
) -> None:
    install("""
echo '{ "message": "Inspecting the source", "type": "message" }'
echo '{ "message": "multi-boot operating systems are not supported", "type": "error" }'
echo 'virt-v2v-in-place: error: multi-boot operating systems are not supported' >&2
exit 1""")
    with pytest.raises(ConversionError, match="multi-boot operating systems") as caught:
        await run(v2vdir)
    error = caught.value
    assert error.phase == "Inspecting the source"
    assert error.message.count("multi-boot") == 1
    assert error.log == v2vdir.log("convert")
    assert "--root first" in (error.hint or "")
    assert not v2vdir.metadata_out.exists()


@pytest.mark.anyio
async def test_a_failure_before_any_json_is_found_on_standard_error(
    v2vdir: V2VDir, install: Install
) -> None:
    install("echo 'virt-v2v-in-place: error: no such thing' >&2; exit 1")
    with pytest.raises(ConversionError, match="no such thing") as caught:
        await run(v2vdir)
    assert "convert.log" in (caught.value.hint or "")


@pytest.mark.anyio
async def test_a_crash_without_a_word(v2vdir: V2VDir, install: Install) -> None:
    install("kill -SEGV $$")
    with pytest.raises(ConversionError, match="SIGSEGV"):
        await run(v2vdir)


@pytest.mark.anyio
async def test_success_without_guestcaps_is_no_success(v2vdir: V2VDir, install: Install) -> None:
    install("exit 0")
    with pytest.raises(ConversionError, match="did not tell"):
        await run(v2vdir)


@pytest.mark.anyio
async def test_output_that_is_no_text_and_has_no_end_of_line(
    v2vdir: V2VDir, install: Install
) -> None:
    install(
        "head -c 3000000 /dev/zero >&2; printf '\\n\\377\\376\\n' >&2\n"
        + play("v2v-2.2-windows")
        + "\nprintf 'no newline'"
    )
    await run(v2vdir)
    log = v2vdir.log("convert").read_bytes()
    assert b"\xff\xfe\n" in log
    assert b"no newline\n" in log


@pytest.mark.anyio
async def test_no_secret_in_argv_log_events_or_files_left(v2vdir: V2VDir, install: Install) -> None:
    install(
        "tr '\\0' ' ' < /proc/$$/cmdline >&2; echo >&2\n"
        'for f; do case $f in *:file:*) ls -l "${f##*:file:}" >&2; '
        'cp "${f##*:file:}" "$TMPDIR/../seen";; esac; done\n' + play("v2v-2.2-windows")
    )
    events = await run(v2vdir, ConvertOptions(keys=("all:key:hu:sh",), verbose=True, trace=True))
    seen = v2vdir.path / "seen"
    assert seen.read_text() == "hu:sh", "whole, with its colon and without a newline"
    seen.unlink()
    assert "-rw-------" in v2vdir.log("convert").read_text()
    assert not any("hu:sh" in event.to_json() for event in events)
    for path in v2vdir.path.rglob("*"):
        if path.is_file():
            assert "hu:sh" not in path.read_text(), path
    assert not list(v2vdir.path.glob("secret-*"))


@pytest.mark.anyio
async def test_cancelled_it_ends_everything_it_started(
    v2vdir: V2VDir, install: Install, tmp_path: Path
) -> None:
    # A child that ignores SIGTERM and a temporary folder of libguestfs: as after a SIGKILL.
    install(f"""
d=$(mktemp -d /tmp/libguestfsXXXXXX)
echo "    -chardev socket,path=$d/guestfsd.sock,id=channel0 " >&2
(trap '' TERM; sleep 1000) &
echo $! $d > {tmp_path}/pids.new; mv {tmp_path}/pids.new {tmp_path}/pids
wait""")
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(run, v2vdir)
            await until((tmp_path / "pids").exists, "the appliance is there")
            log = v2vdir.log("convert")
            await until(lambda: "chardev" in log.read_text(), "the step has read the line as well")
            group.cancel_scope.cancel()
    pid, folder = (tmp_path / "pids").read_text().split()
    await until(lambda: process.start_time(int(pid)) is None, "the child has gone")
    assert not Path(folder).exists()
    assert v2vdir.state.processes == []
    assert not list(v2vdir.path.glob("tmp.*"))


@pytest.mark.anyio
async def test_a_child_that_stays_does_not_hold_the_step(v2vdir: V2VDir, install: Install) -> None:
    install("sleep 1000 &\n" + play("v2v-2.2-windows"))
    with anyio.fail_after(20):
        await run(v2vdir)


@pytest.mark.anyio
async def test_a_mac_that_no_interface_has_is_warned_of(v2vdir: V2VDir, install: Install) -> None:
    install(play("v2v-2.2-windows"))
    macs = (MacMapping("52:54:00:00:00:99", "network", "x"),)
    events = await run(v2vdir, ConvertOptions(network=NetworkOptions(macs=macs)))
    assert events[0].type == "warning"
    assert "52:54:00:00:00:99" in (events[0].text or "")


def test_source_xml_of_a_hostile_guest() -> None:
    source = SOURCE.model_copy(update={"name": "a\x00b<!--\x1f"})
    document = etree.fromstring(source_xml(source, lambda index: Path(f"/v & v/in{index}")))
    assert document.findtext("name") == "a_b<!--_"
    files = [element.get("file") for element in document.iterfind("devices/disk/source")]
    assert files == [f"nbd+unix:///?socket=/v%20%26%20v/in{i}" for i in (1, 2)]
    assert [e.get("type") for e in document.iterfind("devices/disk/driver")] == ["nbd", "nbd"]
    assert [element.tag for element in document.iterfind("features/*")] == ["acpi"]


@pytest.mark.parametrize(
    ("customize", "expected"),
    [
        (("--root-password", "password:hush"), ("--root-password", "file:{0}")),
        (("--root-password=password:hush",), ("--root-password=file:{0}",)),
        (("--password", "joe:password:hush"), ("--password", "joe:file:{0}")),
        (("--password", "joe:locked:password:hush"), ("--password", "joe:locked:file:{0}")),
        (("--root-password", "random"), ("--root-password", "random")),
        (("--run-command", "password:x"), ("--run-command", "password:x")),
        (("--root-password",), ("--root-password",)),
    ],
)
def test_passwords_of_customisation(
    tmp_path: Path, customize: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    with secret_files(tmp_path, [], customize) as safe:
        file = tmp_path / "secret-1"
        assert tuple(safe.customize) == tuple(word.format(file) for word in expected)
        if "{0}" in "".join(expected):
            assert file.read_text() == "hush"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "safe_key"),
    [
        ("/dev/sda1:key:a:file:b", "/dev/sda1:file:{0}"),
        ("all:file:/etc/key", "all:file:/etc/key"),
        ("all:clevis", "all:clevis"),
    ],
)
def test_keys(tmp_path: Path, key: str, safe_key: str) -> None:
    with secret_files(tmp_path, [key], []) as safe:
        assert safe.keys == [safe_key.format(tmp_path / "secret-1")]


@pytest.mark.parametrize("key", ["", "hush", "all:hush", ":key:hush", "all:clevis:x"])
def test_bad_keys_are_not_quoted_in_the_error(tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError) as caught, secret_files(tmp_path, ["a:key:x", key], []):
        pass
    assert "hush" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "the first one's file is gone as well"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("inspection could not detect the source guest (or physical machine)", "all disks"),
        ("could not find key to open LUKS encrypted /dev/sda2", "--key"),
        ("unable to mount the disk image for writing. … Windows Hibernation or Fast", "powercfg"),
        ("not enough free space for conversion on filesystem ‘/’", "make room"),
    ],
)
def test_hints(said: str, expected: str) -> None:
    assert expected in (hint_for(said) or "")


def test_no_hint_is_better_than_a_wrong_one() -> None:
    assert hint_for("the frobnicator frobbed") is None
