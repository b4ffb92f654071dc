"""virt-v2v-in-place's command line and features."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async import virt_v2v_in_place
from v2v_async.errors import DependencyError, UsageError
from v2v_async.options import ConvertOptions, MacMapping, NetworkOptions
from v2v_async.virt_v2v_in_place import Features, Message

OLD = virt_v2v_in_place.parse_features(
    "/usr/bin/virt-v2v-in-place",
    "virt-v2v-in-place 2.2.0\n",
    "--bridge\n--key\n--mac\n--root\n",
    "virt-v2v-in-place-2.0\nio\nmac-ip-option\ninput:libvirtxml\n",
)
NEW = virt_v2v_in_place.parse_features(
    "/usr/bin/virt-v2v-in-place",
    "virt-v2v-in-place 2.10.0\n",
    "--key\n--root\n--run-command\n--root-password\n",
    "io\ncustomize-ops\noutput-xml-option\nblock-driver-option\n",
)


def command(
    features: Features, options: ConvertOptions, customize: tuple[str, ...] = ()
) -> list[str]:
    return virt_v2v_in_place.command(
        features,
        Path("/v/source.xml"),
        options,
        keys=["all:file:/v/secret-1"],
        customize=customize,
        output_xml=Path("/v/inspection.xml"),
    )


def test_features_of_recorded_versions() -> None:
    assert OLD.version == (2, 2, 0)
    assert not OLD.has_output_xml
    assert not OLD.can_customize
    assert NEW.version == (2, 10, 0)
    assert NEW.has_output_xml
    assert NEW.can_customize


def test_version_of_a_vendor_with_a_suffix() -> None:
    features = virt_v2v_in_place.parse_features("x", "virt-v2v-in-place 2.8.1rhel=9,rel=3", "", "")
    assert features.version == (2, 8, 1)


def test_the_debugging_output_is_always_asked_for_and_tracing_only_on_request() -> None:
    plain = command(OLD, ConvertOptions())
    assert "-v" in plain
    assert "-x" not in plain
    assert "-x" in command(OLD, ConvertOptions(trace=True))
    assert plain[-3:] == ["-i", "libvirtxml", "/v/source.xml"]


def test_output_xml_only_where_it_is_known() -> None:
    assert "-O" not in command(OLD, ConvertOptions())
    argv = command(NEW, ConvertOptions())
    assert argv[argv.index("-O") + 1] == "/v/inspection.xml"


@pytest.mark.parametrize(("given", "passed"), [(None, "single"), ("ask", "single"), ("first",) * 2])
def test_root_never_asks_a_terminal_that_is_not_there(given: str | None, passed: str) -> None:
    argv = command(OLD, ConvertOptions(root=given))
    assert argv[argv.index("--root") + 1] == passed


def test_only_static_addresses_are_handed_on() -> None:
    macs = (
        MacMapping("52:54:00:00:00:01", "ip", "10.0.0.2,10.0.0.1,24"),
        MacMapping("52:54:00:00:00:02", "bridge", "br0"),
    )
    argv = command(OLD, ConvertOptions(network=NetworkOptions(macs=macs)))
    assert argv[argv.index("--mac") + 1] == "52:54:00:00:00:01:ip:10.0.0.2,10.0.0.1,24"
    assert argv.count("--mac") == 1


def test_keys_come_from_the_caller_and_never_from_the_options() -> None:
    argv = command(OLD, ConvertOptions(keys=("all:key:hush",), keys_from_stdin=True))
    assert "hush" not in " ".join(argv)
    assert argv[argv.index("--key") + 1] == "all:file:/v/secret-1"
    assert "--keys-from-stdin" in argv


def test_customising_needs_a_version_that_can() -> None:
    with pytest.raises(UsageError, match="has no option --run-command") as caught:
        command(OLD, ConvertOptions(), ("--run-command", "true"))
    assert "2.6" in (caught.value.hint or "")
    assert command(NEW, ConvertOptions(), ("--run-command", "true")).count("--run-command") == 1
    with pytest.raises(UsageError, match="--frobnicate"):
        command(NEW, ConvertOptions(), ("--frobnicate=1",))


def test_the_cache_stays_when_the_temporary_files_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIBGUESTFS_CACHEDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/big/tmp")
    made = virt_v2v_in_place.environment(Path("/v/tmp"), {"LIBGUESTFS_BACKEND": "direct"})
    assert made["TMPDIR"] == made["LIBGUESTFS_TMPDIR"] == "/v/tmp"
    assert made["LIBGUESTFS_CACHEDIR"] == "/big/tmp"
    assert made["LIBGUESTFS_BACKEND"] == "direct"
    monkeypatch.delenv("TMPDIR")
    assert virt_v2v_in_place.environment(Path("/v"), {})["LIBGUESTFS_CACHEDIR"] == "/var/tmp"


@pytest.mark.parametrize(
    "line",
    [
        "[  12.3] Opening the source",
        "{ not json",
        '{ "message": 3, "type": "message" }',
        '{ "message": "x", "type": "progress" }',
        "[1]",
        "",
    ],
)
def test_lines_that_are_no_messages(line: str) -> None:
    assert virt_v2v_in_place.parse_message(line) is None


def test_a_message_loses_its_colours() -> None:
    line = '{ "message": "\\u001b[31mno\\u001b[0m", "timestamp": "x", "type": "error" }'
    assert virt_v2v_in_place.parse_message(line) == Message("error", "no")


def test_error_and_phase_lines() -> None:
    assert virt_v2v_in_place.parse_error("virt-v2v-in-place: error: no") == "no"
    assert virt_v2v_in_place.parse_error("virt-v2v-in-place: warning: no") is None
    assert virt_v2v_in_place.parse_phase("[ 112.3] Converting x to run on KVM\n") == (
        "Converting x to run on KVM"
    )


def test_socket_directory_of_qemus_command_line() -> None:
    line = r"    -chardev socket,path=/tmp/libguestfs1bLoRn/guestfsd.sock,id=channel0 \ "
    assert virt_v2v_in_place.parse_socket_directory(line) == "/tmp/libguestfs1bLoRn"
    assert virt_v2v_in_place.parse_socket_directory("echo /tmp/libguestfs1bLoRn/x") is None


@pytest.mark.anyio
async def test_a_missing_program_says_how_to_get_it() -> None:
    with pytest.raises(DependencyError, match="not installed") as caught:
        await virt_v2v_in_place.probe("virt-v2v-that-is-not-there")
    assert "virt-v2v" in (caught.value.hint or "")


@pytest.mark.anyio
async def test_a_program_that_is_too_old_or_broken(tmp_path: Path) -> None:
    program = tmp_path / "old"
    program.write_text("#!/bin/sh\necho virt-v2v-in-place 2.0.7\n")
    program.chmod(0o755)
    with pytest.raises(DependencyError, match=r"2\.0\.7 is too old"):
        await virt_v2v_in_place.probe(str(program))
    program.write_text("#!/bin/sh\necho no libguestfs here >&2\nexit 3\n")
    with pytest.raises(DependencyError, match=r"exit status 3.*no libguestfs here"):
        await virt_v2v_in_place.probe(str(program))
