"""Addresses of hosts, the commands that log in, and what their errors mean."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async import ssh
from v2v_async.errors import SourceError, UsageError
from v2v_async.input.registry import input_class, parse_input
from v2v_async.options import InputOptions
from v2v_async.secret import Secret
from v2v_async.ssh import LoginError, SshHost


def parsed(text: str) -> tuple[str, str | None, int | None, str]:
    return ssh.parse_address(text, "-i vmx", scheme="ssh")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ssh://esxi/a.vmx", ("esxi", None, None, "/a.vmx")),
        (
            "ssh://root@ESXi.example.com:2222/x/a.vmx",
            ("ESXi.example.com", "root", 2222, "/x/a.vmx"),
        ),
        ("ssh://root@h/my%20guest/%23%3F%25.vmx", ("h", "root", None, "/my guest/#?%.vmx")),
        ("ssh://a%40b@h/x", ("h", "a@b", None, "/x")),
        ("ssh://[fe80::1%25eth0]:22/x", ("fe80::1%eth0", None, 22, "/x")),
        ("ssh://192.0.2.1", ("192.0.2.1", None, None, "")),
    ],
)
def test_addresses(text: str, found: tuple[str, str | None, int | None, str]) -> None:
    assert parsed(text) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/x/a.vmx", "is not an address of ssh://"),
        ("ssh:///x/a.vmx", "is not an address of ssh://"),
        ("https://h/x", "is not an address of ssh://"),
        ("ssh://h:port/x", "is not an address"),
        ("ssh://h:99999/x", "is not an address"),
        ("ssh://h:0/x", "no port 0"),
        ("ssh://[::1/x", "is not an address"),
        ("ssh://-oProxyCommand=x/x", "can't have this name"),
        ("ssh://-l@h/x", "can't have this name"),
        ("ssh://a%20b@h/x", "can't have this name"),
        ("ssh://h%0a/x", "can't have this name"),
        ("ssh://h/x?y=z", "has no meaning: ‘\\?y=z’"),
        ("ssh://h/x#1.vmx", "has no meaning: ‘#1.vmx’"),
        ("ssh://h/x%00", "has no meaning"),
        ("ssh://h/%ff", "is not UTF-8"),
    ],
)
def test_what_is_no_address(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(text)


def test_a_password_in_an_address_is_refused_and_not_told() -> None:
    with pytest.raises(UsageError, match="holds a password") as caught:
        parsed("ssh://root:hunter2@h/x")
    assert "hunter2" not in str(vars(caught.value))


@given(st.text(max_size=60).map(lambda text: "ssh://" + text))
def test_any_address_is_understood_or_refused(text: str) -> None:
    try:
        host, user, _, _ = parsed(text)
    except UsageError:
        return
    assert not host.startswith("-")
    assert not (user or "").startswith("-")


def test_the_command_asks_nobody_and_says_no_secret() -> None:
    argv = ssh.command(
        SshHost("h", "u", 22, Path("/c"), Path("/i %d"), Path("/k n"), Secret("hunter2")),
        ["virsh", shlex.quote("a b")],
    )
    assert argv[-3:] == ["--", "h", "virsh 'a b'"]
    assert argv[argv.index("-i") + 1] == "/i %%d"
    assert 'UserKnownHostsFile="/k n"' in argv
    assert "StrictHostKeyChecking=yes" in argv
    assert "BatchMode=no" in argv
    assert "hunter2" not in " ".join(argv)
    assert "BatchMode=yes" in ssh.command(SshHost("h"), ["true"])


def test_a_secret_is_not_in_a_hosts_repr() -> None:
    assert "hunter2" not in repr(SshHost("h", secret=Secret("hunter2")))


def test_parameters_of_the_plugin() -> None:
    host = SshHost("h", "u", 2222, identity=Path("/i"), known_hosts=Path("/k%"))
    assert ssh.plugin_parameters(host, "/x y") == [
        *("host=h", "path=/x y", "timeout=20", "user=u", "port=2222"),
        *("identity=/i", "known-hosts=/k%%"),
    ]


@pytest.mark.parametrize(
    ("said", "meant", "is_login"),
    [
        ("nbdkit: ssh[1]: error: host key for server changed", "not the one that is known", True),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", "not the one that is known", True),
        ("Host key verification failed.", "its host key is not known", True),
        ("No ED25519 host key is known for h and you have", "its host key is not known", True),
        ("u@h: Permission denied (publickey,password).", "it refused the login", True),
        ("ssh: connect to host h port 22: Connection refused", "refused the connection", True),
        ("ssh: Could not resolve hostname h: Name or service not", "there is no such host", True),
        ("nbdkit: ssh[1]: error: failed to connect: Timeout connecting to h", "not answer", True),
        ("kex_exchange_identification: read: Connection reset by peer", "it closed the", True),
        ("error: cannot open file: SFTP server: No such file", "there is no such file", False),
        ("error: cannot open file: SFTP server: Permission denied", "permission denied", False),
        ("error: cannot open file: SFTP server: Failure", "the host failed to open it", False),
        ("x\nnbdkit: error: a thing of its own\n", "it: a thing of its own", False),
        ("", "it: it said nothing", False),
    ],
)
def test_what_errors_mean(said: str, meant: str, is_login: bool) -> None:
    error = SshHost("h", "u", 23).failure(said, doing="it")
    assert isinstance(error, SourceError)
    assert isinstance(error, LoginError) is is_login
    assert meant in error.message
    assert is_login is ("u@h:23" in error.message)
    assert "{" not in str(error.hint)


def options(argument: str = "ssh://h/a.vmx", **more: object) -> InputOptions:
    return InputOptions("vmx", (argument,), **{"transport": "ssh", **more})  # type: ignore[arg-type]


def xen(connection: str, *arguments: str, **more: object) -> InputOptions:
    return InputOptions("libvirt", arguments or ("g",), connection, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (InputOptions("vmx"), "one VMX file is to be named"),
        (InputOptions("vmx", ("a", "b")), "one VMX file is to be named"),
        (options("a.vmx"), "is not an address of ssh://"),
        (options(transport="vddk"), "‘-it vddk’ has no meaning"),
        (options(transport=None), "is on another host"),
        (options("a.vmx", transport=None, password=Secret("x")), "no meaning for a local file"),
        (
            options("a.vmx", transport=None, options=(("ssh-config", "x"),)),
            "no meaning for a local file",
        ),
        (options("ssh://h/"), "names no file"),
        (options("ssh://h/x/"), "names no file"),
        (options(options=(("what", "x"),)), "takes no -io what"),
        (options(options=(("overlay", "x"),)), "‘-io overlay=x’ is not known"),
        (options(options=(("ssh-identity", None),)), "the file is missing"),
        (options(options=(("ssh-config", "a"), ("ssh-config", "b"))), "was given twice"),
        (xen("xen+ssh://h", "a", "b"), "one guest is to be named"),
        (xen("xen+ssh://h", "a\nb"), "control characters"),
        (xen("xen+ssh://u:hunter2@h"), "holds a password"),
        (xen("xen+ssh://h/?socket=/x"), "has no meaning"),
        (xen("xen+ssh://h", transport="vddk"), "‘-it vddk’ has no meaning"),
        (xen("xen+ssh://h", format="x"), "unknown format"),
        (xen("xen+ssh://h", options=(("what", "x"),)), "takes no -io what"),
    ],
)
def test_a_wrong_command_line_exits_2(given: InputOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_input(given)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("connection", ["xen+ssh://h", "xen+ssh://h/", "xen+ssh://h/?no_tty=1"])
def test_connections_of_xen(connection: str) -> None:
    assert isinstance(parse_input(xen(connection, transport="ssh")), input_class("xen-ssh"))
