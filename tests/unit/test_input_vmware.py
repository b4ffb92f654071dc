"""What -ic vpx:// and -it vddk make of their options, before anybody is asked."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.cli.modes import INPUT_KINDS
from v2v_async.connection import CONNECT_TIMEOUT_S
from v2v_async.errors import SourceError, UsageError
from v2v_async.input.registry import input_class, parse_input
from v2v_async.input.vmware.server_guest import SERVER_RETRY
from v2v_async.input.vmware.uri import parse_datastore_path, parse_uri
from v2v_async.input.vmware.vcenter import RENEW_S
from v2v_async.input.vmware.vddk_options import VddkOptions, parse_vddk_options
from v2v_async.options import InputOptions
from v2v_async.secret import Secret

URI = "vpx://user@vc.example.com/DC/esxi"
THUMBPRINT = ":".join(["aB"] * 20)


def options(*io: tuple[str, str | None], **changes: object) -> InputOptions:
    given: dict[str, object] = {
        "arguments": ("guest",),
        "connection": URI,
        "password": Secret("x"),
        "transport": "vddk" if any(name.startswith("vddk") for name, _ in io) else None,
        "options": io,
    }
    return InputOptions(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "user", "host", "port", "path", "verify"),
    [
        ("vpx://vc/DC/esxi", "administrator", "vc", None, ("DC", "esxi"), True),
        ("vpx://a%40b.c@vc:8443/F/My%20DC/cl/h", "a@b.c", "vc", 8443, None, True),
        ("vpx://D%5cu@[::1]/DC/h?no_verify=1", "D\\u", "::1", None, ("DC", "h"), False),
        ("vpx://u@vc/DC/h?no_verify=0&auto_answer=1", "u", "vc", None, ("DC", "h"), True),
        ("esx://h?no_verify=1", "root", "h", None, (), False),
        ("esx://me@h/", "me", "h", None, (), True),
    ],
)
def test_uris(
    text: str, user: str, host: str, port: int | None, path: tuple[str, ...] | None, verify: bool
) -> None:
    uri = parse_uri(text)
    assert (uri.user, uri.host, uri.port, uri.verify) == (user, host, port, verify)
    assert uri.path == (path if path is not None else ("F", "My DC", "cl", "h"))


@pytest.mark.parametrize(
    ("text", "datacenter"),
    [
        ("vpx://v/DC/h", "DC"),
        ("vpx://v/A/B/C", None),  # a folder and a datacenter, or a datacenter and a cluster
        ("esx://h", "ha-datacenter"),
    ],
)
def test_the_datacenter_in_the_path_is_taken_only_where_it_is_clear(
    text: str, datacenter: str | None
) -> None:
    assert parse_uri(text).datacenter == datacenter


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vpx:///DC/h", "names no server"),
        ("vpx://u:hunter2@v/DC/h", "has a password in it"),
        ("vpx://v:http/DC/h", "is not a URI"),
        ("vpx://[::1/DC/h", "is not a URI"),
        ("vpx://v/DC", "does not name the datacenter and the host"),
        ("vpx://v", "does not name the datacenter and the host"),
    ],
)
def test_wrong_uris(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_uri(text)
    assert "hunter2" not in str(vars(caught.value))


@given(st.text().map(lambda text: f"vpx://{text}") | st.text())
def test_any_text_is_a_uri_or_a_usage_error(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UsageError:
        return
    assert uri.host
    assert uri.text == text


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("[ds1] g/g.vmdk", "https://h/folder/g/g-flat.vmdk?dcPath=DC&dsName=ds1"),
        (
            "[a b] My guest/é&?#.vmdk",
            "https://h/folder/My%20guest/%C3%A9%26%3F%23-flat.vmdk?dcPath=DC&dsName=a%20b",
        ),
        ("[ds] 100%/x+y.vmdk", "https://h/folder/100%25/x%2By-flat.vmdk?dcPath=DC&dsName=ds"),
        ("[ds] top.vmdk", "https://h/folder/top-flat.vmdk?dcPath=DC&dsName=ds"),
    ],
)
def test_the_url_of_a_disk(text: str, url: str) -> None:
    path = parse_datastore_path(text)
    assert str(path) == text
    assert path.url("h", "DC") == url


@given(
    st.text(st.characters(exclude_characters="]\n", exclude_categories=["Cs"]), min_size=1),
    st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
)
def test_names_survive_the_url(datastore: str, stem: str, datacenter: str) -> None:
    if ".." in stem.split("/"):
        return
    url = parse_datastore_path(f"[{datastore}] {stem}.vmdk").url("h:1", datacenter)
    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    parts = urlsplit(url)
    assert parts.netloc == "h:1"
    assert unquote(parts.path) == f"/folder/{stem}-flat.vmdk"
    assert parse_qs(parts.query, keep_blank_values=True) == {
        "dcPath": [datacenter],
        "dsName": [datastore],
    }


@given(st.text())
def test_any_text_is_a_path_or_a_source_error(text: str) -> None:
    try:
        path = parse_datastore_path(text)
    except SourceError:
        return
    assert str(path) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/etc/shadow",
        "[ds]",
        "[ds] x",
        "[ds] ../../etc/shadow.vmdk",
        "[] x.vmdk",
        "[d] x.vmdk\n",
    ],
)
def test_what_is_not_on_a_datastore_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="is not a file on a datastore"):
        parse_datastore_path(text)


@pytest.mark.parametrize(
    ("text", "is_snapshot"),
    [
        ("[d] g/g.vmdk", False),
        ("[d] g/g-000001.vmdk", True),
        ("[d] g/g_1-000123.vmdk", True),
        ("[d] g/g-00001.vmdk", False),
        ("[d] g/g-0000001.vmdk", False),
    ],
)
def test_snapshots_are_known_by_name(text: str, is_snapshot: bool) -> None:
    assert parse_datastore_path(text).is_snapshot is is_snapshot


def test_what_is_passed_to_the_plugin() -> None:
    given = parse_vddk_options(
        [
            ("vddk-libdir", "/opt/vddk"),
            ("vddk-thumbprint", THUMBPRINT),
            ("vddk-config", "/etc/vddk.conf"),
            ("vddk-cookie", "c"),
            ("vddk-nfchostport", "903"),
            ("vddk-port", "444"),
            ("vddk-snapshot", "snapshot-1"),
            ("vddk-transports", "nbdssl:nbd"),
        ]
    )
    assert given.thumbprint == THUMBPRINT.upper()
    made = given.parameters(
        parse_uri("vpx://D%5cu@vc:8443/DC/h"), file="[d] x/x.vmdk", moref="vm-1", thumbprint="AB"
    )
    assert set(made) == {
        "file=[d] x/x.vmdk",
        "server=vc",
        "user=D\\u",
        "vm=moref=vm-1",
        "thumbprint=AB",
        "config=/etc/vddk.conf",
        "cookie=c",
        "libdir=/opt/vddk",
        "nfchostport=903",
        "snapshot=snapshot-1",
        "transports=nbdssl:nbd",
        "port=444",
    }
    assert "'c'" not in repr(given)


def test_the_port_of_the_uri_is_the_plugins_too() -> None:
    def port(text: str) -> list[str]:
        made = VddkOptions().parameters(parse_uri(text), file="f", moref="m", thumbprint="t")
        return [word for word in made if word.startswith("port=")]

    assert port("esx://h:8443") == ["port=8443"]
    assert port("esx://h") == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("vddk-port", "0")], "is not a port"),
        ([("vddk-port", "65536")], "is not a port"),
        ([("vddk-nfchostport", "x")], "is not a port"),
        ([("vddk-thumbprint", "AB:CD")], "is not the SHA-1"),
        ([("vddk-thumbprint", "GG" + THUMBPRINT[2:])], "is not the SHA-1"),
        ([("vddk-transports", "nbd,san")], "is not MODE:MODE"),
        ([("vddk-compression", "gzip")], "vddk-compression=gzip"),
        ([("vddk-noextents", "yes")], "vddk-noextents=yes"),
        ([("vddk-libdir", "/a"), ("vddk-libdir", "/b")], "given twice"),
        ([("vddk-config", "a\nb")], "is not one line"),
    ],
)
def test_wrong_vddk_options(given: list[tuple[str, str]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_vddk_options(given)


def test_a_file_for_each_disk_or_for_none() -> None:
    made = parse_vddk_options([("vddk-file", "[d] b.vmdk"), ("vddk-file", "[d] a.vmdk")])
    made.check_files(2)
    assert [made.file(n, "x") for n in range(2)] == ["[d] b.vmdk", "[d] a.vmdk"]
    with pytest.raises(SourceError, match="2 times for 3 disks"):
        made.check_files(3)
    none = parse_vddk_options([])
    none.check_files(3)
    assert none.file(2, "x") == "x"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arguments": ()}, "takes the name of one guest, not 0"),
        ({"arguments": ("a", "b")}, "takes the name of one guest, not 2"),
        ({"password": None}, "needs a password"),
        ({"options": (("overlay", "raw"),)}, "overlay=raw"),
        ({"options": (("overlay", None),)}, "‘-io overlay’ is not known"),
        ({"options": (("vddk-libdir", "/x"),)}, "takes no -io"),
        ({"connection": "vpx://u:hunter2@v/DC/h"}, "has a password in it"),
    ],
)
def test_wrong_options(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_input(options(**changes))
    assert "hunter2" not in str(vars(caught.value))


def test_an_unknown_option_is_shown_without_its_secret() -> None:
    with pytest.raises(UsageError, match="takes no -io") as caught:
        parse_input(options(("vddk-password", "password=hunter2")))
    assert "hunter2" not in str(vars(caught.value))


@pytest.mark.parametrize("kind", ["vcenter", "vddk"])
def test_the_command_line_lists_the_same_options(kind: str) -> None:
    assert dict(INPUT_KINDS[kind].options) == dict(input_class(kind).option_help)


def test_a_lost_session_is_renewed_before_anybody_gives_up() -> None:
    """Opening a disk is tried again by the filter that is nearest to the plugin alone."""
    assert list(SERVER_RETRY)[-1] == "retry-request"
    values = dict(word.split("=") for word in SERVER_RETRY["retry-request"])
    patience = int(values["retry-request-retries"]) * int(values["retry-request-delay"])
    assert RENEW_S < patience < CONNECT_TIMEOUT_S
