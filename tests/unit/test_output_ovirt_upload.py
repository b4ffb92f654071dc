"""-o rhv-upload: its options, names, and what the engine's client makes of answers."""

from __future__ import annotations

import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from v2v_async.errors import TargetError, UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.ovirt.engine_guest import check_name, compliant_name
from v2v_async.output.ovirt.upload import RhvUploadOutput
from v2v_async.output.registry import parse_output
from v2v_async.ovirt_engine import EngineLogin, _parse, _reason, tls_context
from v2v_async.secret import Secret

API = "https://engine.example.com/ovirt-engine/api"
UUID = "12345678-1234-1234-1234-123456789ABC"
HOSTILE = [
    "",
    " ",
    "a b",
    "a'b",
    'a"b',
    "a$(reboot)b",
    "a\nb",
    "../../etc/passwd",
    "x" * 300,
    "🐧",
    "name=*",
    "a or name=b",
    "a<b>&c",
    "a\0b",
]


def parse(*options: tuple[str, str | None], **fields: Any) -> RhvUploadOutput:
    given = {"connection": API, "storage": "data-1", "password": Secret("hush")}
    made = parse_output(OutputOptions(mode="rhv-upload", options=options, **{**given, **fields}))
    assert isinstance(made, RhvUploadOutput)
    return made


def test_the_defaults_are_virt_v2vs() -> None:
    options = parse().options
    login = options.login
    assert (login.user, login.host, login.port) == ("admin@internal", "engine.example.com", 443)
    assert login.url == API
    assert not login.verify
    assert (options.cluster, options.format, options.use_proxy) == ("Default", "raw", False)
    assert not options.is_preallocated


@pytest.mark.parametrize(
    ("url", "user"),
    [
        ("https://engine/ovirt-engine/api", "admin@internal"),
        ("https://admin@internal@engine/ovirt-engine/api/", "admin@internal"),
        ("https://me%40my%20profile@engine:8443/ovirt-engine/api", "me@my profile"),
        ("https://admin@ovirt@internalsso@[fe80::1]/api", "admin@ovirt@internalsso"),
    ],
)
def test_the_user_in_the_address(url: str, user: str) -> None:
    login = parse(connection=url).options.login
    assert login.user == user
    assert "@" not in login.url
    assert login.url.endswith("/api")


@pytest.mark.parametrize("prefix", ["rhv", "ovirt"])
def test_both_spellings(prefix: str, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch()
    options = parse(
        (f"{prefix}-cafile", str(authority)),
        (f"{prefix}-cluster", "my cluster"),
        (f"{prefix}-proxy", None),
        (f"{prefix}-verifypeer", "true"),
        (f"{prefix}-disk-uuid", UUID),
        format="qcow2",
    ).options
    assert options.login.verify
    assert options.login.ca_file == str(authority)
    assert options.cluster == "my cluster"
    assert options.use_proxy
    assert options.disk_ids == (UUID.lower(),)
    assert parse((f"{prefix}-direct", "false")).options.use_proxy
    assert not parse((f"{prefix}-direct", None)).options.use_proxy


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ([], {"connection": None}, "needs the engine's address"),
        ([], {"connection": "http://engine/ovirt-engine/api"}, "not an engine's address"),
        ([], {"connection": "https://engine"}, "not that of an engine's API"),
        ([], {"connection": "https://engine/ovirt-engine/api?x=1"}, "not that of an engine's"),
        ([], {"connection": "https://me:hush@engine/ovirt-engine/api"}, "has a password in it"),
        ([], {"connection": "https://a@internal:hush@e/ovirt-engine/api"}, "has a password in it"),
        ([], {"connection": "https://engine:x/ovirt-engine/api"}, "not a URL"),
        ([], {"password": None}, "needs the password"),
        ([], {"storage": None}, "needs a storage domain"),
        ([], {"storage": "name=* or x"}, "can't be the name of a storage domain"),
        ([], {"format": "vmdk"}, "writes raw or qcow2"),
        ([], {"format": "qcow2", "allocation": "preallocated"}, "exclude each other"),
        ([("compressed", None)], {}, "has no option ‘-oo compressed’"),
        ([("rhv-cafile", "/nowhere/ca.pem")], {}, "there is no file"),
        ([("rhv-cluster", None)], {}, "nothing given"),
        ([("rhv-cluster", "a"), ("ovirt-cluster", "b")], {}, "given twice"),
        ([("rhv-proxy", "maybe")], {}, "true or false"),
        ([("rhv-proxy", None), ("rhv-direct", None)], {}, "say the same"),
        ([("rhv-disk-uuid", "1234")], {}, "not a UUID"),
        ([("rhv-disk-uuid", "0" * 8 + "-0000-0000-0000-" + "0" * 12)], {}, "not a UUID"),
        ([("rhv-disk-uuid", UUID), ("ovirt-disk-uuid", UUID.lower())], {}, "given twice"),
        ([], {"name": "a b"}, "can't be the name of the new guest"),
    ],
)
def test_refused(
    options: list[tuple[str, str | None]], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(*options, **fields)
    assert "hush" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_with_one_that_is_not(name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name"):
        check_name(name)
    check_name(compliant_name(name))


@pytest.mark.parametrize("name", ["web", "Web_1.example-2+", "größe", "ウェブ", "x" * 255])
def test_a_name_that_ovirt_takes(name: str) -> None:
    check_name(name)
    assert compliant_name(name) == name[:64]


def login(**fields: Any) -> EngineLogin:
    given = {"host": "engine", "port": 443, "path": "/ovirt-engine/api", "user": "o'neill@x y"}
    return EngineLogin(**{**given, "password": Secret("hush"), **fields})


def test_the_command_for_people_is_quoted_and_has_no_password() -> None:
    command = login(verify=True, ca_file="/etc/my ca.pem").command("DELETE", "vms/1?detach_only=1")
    words = shlex.split(command)
    assert words[:5] == ["curl", "--user", "o'neill@x y", "--request", "DELETE"]
    assert words[5:] == ["--cacert", "/etc/my ca.pem", f"{login().url}/vms/1?detach_only=1"]
    assert "hush" not in command
    assert "--insecure" in login().command("POST", "imagetransfers/1/cancel", "<action/>")
    assert "hush" not in repr(login())
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(login())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"<fault><reason>Operation Failed</reason><detail>[Cannot add Virtual Disk.\n Low disk"
            b" space.]</detail></fault>",
            "Cannot add Virtual Disk. Low disk space.",
        ),
        (b"<action><fault><detail>locked</detail></fault><status>failed</status></action>", "lock"),
        (b"<fault><reason>Only a reason</reason></fault>", "Only a reason"),
        (b"<html>no</html>", "409 Conflict"),
        (b"not XML at all", "409 Conflict"),
        (b"", "409 Conflict"),
    ],
)
def test_what_a_fault_says(content: bytes, reason: str) -> None:
    assert reason in _reason(409, _parse(content))


def test_no_entity_of_an_answer_is_resolved(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush")
    found = _parse(
        f'<!DOCTYPE d [<!ENTITY x SYSTEM "file://{secret}">]><detail>&x;</detail>'.encode()
    )
    assert found is not None
    assert "hush" not in (etree.tostring(found, method="text").decode())


def test_a_file_without_certificates(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("nothing")
    with pytest.raises(TargetError, match="can't be used"):
        tls_context(True, str(wrong))
    tls_context(False, str(wrong))  # not looked at
