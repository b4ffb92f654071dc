"""Hosts behind ssh: their addresses, commands that run on them, and nbdkit's parameters for them.

Two programs log in: OpenSSH's ``ssh`` for a command, and nbdkit's ssh plugin (libssh) for files.
Both read the user's own ``~/.ssh`` unless they are told otherwise, neither ever asks anything, and
both want the host's key to be known. A password reaches them by files of mode 0600 only.

Source: ssh(1), ssh_config(5), nbdkit-ssh-plugin(1).
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import anyio
import anyio.abc

from v2v_async import process
from v2v_async.errors import SourceError, UsageError
from v2v_async.redact import redact
from v2v_async.secret import Secret, secret_file

OPTIONS = {
    "ssh-config": "the ssh configuration file to read in place of ~/.ssh/config",
    "ssh-identity": "a private key to log in with, before those of ~/.ssh",
    "ssh-known-hosts": "the file with the keys of known hosts, in place of ~/.ssh/known_hosts",
}
"""What ``-io`` takes wherever a host is reached by ssh."""

CONNECT_TIMEOUT_S = 20
"""Until a host has answered; ESXi hosts that are busy take some seconds."""
COMMAND_TIMEOUT_S = 120.0
_MOST_ERRORS = 64 * 1024

_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
_USER = re.compile(r"[^\s\0-\x1f\x7f'\"@:/\\-][^\s\0-\x1f\x7f'\"\\]*")
_LOGIN_REASONS = (
    (
        r"host key (?:for server )?.*changed|HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known",
        "find out why; if the host was installed anew, remove the old key: ssh-keygen -R {name}",
    ),
    (
        r"host key is unknown|Host key verification failed|known_hosts file|host key is known",
        "its host key is not known",
        "log in once by hand (ssh {login}) and accept the key, or give -io ssh-known-hosts=FILE",
    ),
    (
        r"authentication (?:methods )?failed|[Pp]ermission denied \(|"
        r"Too many authentication failures",
        "it refused the login",
        "check the user name; put a key that it accepts into ssh-agent or give it with -io "
        "ssh-identity=FILE, or give the password with -ip FILE (‘ssh {login}’ must work)",
    ),
    (
        r"Connection refused",
        "it refused the connection",
        "does sshd run there (on ESXi: is SSH enabled?), and is the port right?",
    ),
    (
        r"resolve|[Nn]ame or service not known|Name does not resolve",
        "there is no such host",
        "check the host's name",
    ),
    (
        r"[Tt]imed out|[Tt]imeout connecting|No route to host|Network is unreachable",
        "it does not answer",
        "check the host's name and the network",
    ),
    (
        r"Connection (?:closed|reset)|Socket error|kex_exchange_identification",
        "it closed the connection",
        "does ‘ssh {login}’ work by hand?",
    ),
)
"""What ssh and libssh say, what it means, what to do."""
_FILE_REASONS = (
    (r"SFTP server: No such file", "there is no such file", "check the name on the host"),
    (
        r"SFTP server: Permission denied",
        "permission denied",
        "log in as a user who can read it",
    ),
    (
        r"SFTP server: Failure",
        "the host failed to open it",
        "is the guest shut down? A running guest's disks are locked",
    ),
)


class LoginError(SourceError):
    """Nobody could log in: the same holds for every other file of the host."""


@dataclass(frozen=True, slots=True)
class SshHost:
    """Where to log in, and how. ``secret`` is the password, None where keys do."""

    host: str
    user: str | None = None
    port: int | None = None
    config: Path | None = None
    identity: Path | None = None
    known_hosts: Path | None = None
    secret: Secret | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """It, for people: ``root@esxi:2222``."""
        port = "" if self.port is None else f":{self.port}"
        return f"{self._login}{port}"

    @property
    def _login(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.user is None else f"{self.user}@{name}"

    def uri(self, path: str) -> str:
        """Return the address of a file on it."""
        return f"ssh://{self.shown}{quote(path)}"

    def failure(self, said: str, *, doing: str) -> SourceError:
        """Return the error that ``said`` (of ssh or nbdkit) means: why ``doing`` failed."""
        for pattern, reason, hint in _FILE_REASONS:
            if re.search(pattern, said):
                return SourceError(f"{doing}: {reason}", hint=hint)
        for pattern, reason, hint in _LOGIN_REASONS:
            if re.search(pattern, said):
                port = "" if self.port is None else f"-p {self.port} "
                named = self.host if self.port is None else f"'[{self.host}]:{self.port}'"
                return LoginError(
                    f"{doing}: can't log in to ‘{self.shown}’: {reason}",
                    hint=hint.format(login=f"{port}{self._login}", name=named),
                )
        last = redact((said.strip().splitlines() or ["it said nothing"])[-1])
        return SourceError(f"{doing}: {last.partition(' error: ')[2] or last}")


def parse_address(
    text: str, option: str, *, scheme: str, others: Sequence[str] = ()
) -> tuple[str, str | None, int | None, str]:
    """Return host, user, port and path of ``SCHEME://[USER@]HOST[:PORT]/PATH``.

    ``option`` is what gave it. A query is refused unless all its words are ``others``, which have
    no meaning here.

    Raises:
        UsageError: it is not such an address, or holds a password.
    """
    shown = redact(text)
    example = f"write it as {scheme}://USER@HOST/PATH, with %20 for a space and so on"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{option} ‘{shown}’ is not an address: {error}", hint=example) from None
    if parts.password is not None:
        raise UsageError(
            f"{option}: the address holds a password, which everybody could see",
            hint="take it out, and give a file that holds it with -ip",
        )
    if parts.scheme != scheme or not host:
        raise UsageError(f"{option} ‘{shown}’ is not an address of {scheme}://", hint=example)
    # urlsplit makes the name lower case, which Host patterns of ssh_config need not be.
    at = parts.netloc.rpartition("@")[2].lower().find(host)
    host = unquote(parts.netloc.rpartition("@")[2][at : at + len(host)])
    user = unquote(parts.username) if parts.username else None
    if not _HOST.fullmatch(host) or (user is not None and not _USER.fullmatch(user)):
        raise UsageError(f"{option} ‘{shown}’: a host or user can't have this name", hint=example)
    if port == 0:
        raise UsageError(f"{option} ‘{shown}’: there is no port 0", hint=example)
    words = [word.partition("=")[0] for word in parts.query.split("&") if word]
    path = unquote(parts.path, errors="surrogateescape")
    if parts.fragment or any(word not in others for word in words) or "\0" in path:
        raise UsageError(
            f"{option} ‘{shown}’: this part of the address has no meaning: "
            f"‘{redact('#' + parts.fragment if parts.fragment else '?' + parts.query)}’",
            hint="write %3F for a question mark and %23 for a hash in a name",
        )
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{option} ‘{shown}’: the path is not UTF-8", hint=example) from None
    return host, user, port, path


def parse_options(pairs: Sequence[tuple[str, str | None]]) -> dict[str, Path]:
    """Return config, identity and known_hosts of the ``-io ssh-…`` options among ``pairs``.

    Raises:
        UsageError: one names no file, or the same is given twice.
    """
    found: dict[str, Path] = {}
    for key, value in pairs:
        if key not in OPTIONS:
            continue
        name = key.removeprefix("ssh-").replace("-", "_")
        if not value:
            raise UsageError(f"-io {key}: the file is missing", hint=f"write -io {key}=FILE")
        if name in found:
            raise UsageError(f"-io {key} was given twice")
        found[name] = Path(value).absolute()
    return found


def check_files(host: SshHost) -> None:
    """Check that the files of ``-io ssh-…`` are there: libssh reads nothing, silently, if not.

    Raises:
        UsageError: one is not.
    """
    for key in OPTIONS:
        path = getattr(host, key.removeprefix("ssh-").replace("-", "_"))
        if path is not None and not path.is_file():
            raise UsageError(f"-io {key}: ‘{path}’ is not a file", hint="check its name")


def plugin_parameters(host: SshHost, path: str) -> list[str]:
    """Return nbdkit's parameters for a file of the host, but for the password."""
    parameters = [f"host={host.host}", f"path={path}", f"timeout={CONNECT_TIMEOUT_S}"]
    if host.user is not None:
        parameters.append(f"user={host.user}")
    if host.port is not None:
        parameters.append(f"port={host.port}")
    for name, value in (
        ("config", host.config),
        ("identity", host.identity),
        ("known-hosts", host.known_hosts),
    ):
        if value is not None:
            parameters.append(f"{name}={_literal(value)}")
    return parameters


@contextmanager
def password_file(host: SshHost, folder: Path) -> Iterator[Path | None]:
    """Have the password in a file of mode 0600 for a block; None where there is no password."""
    if host.secret is None:
        yield None
        return
    with secret_file(folder, host.secret, "ssh-password") as path:
        yield path


def command(host: SshHost, words: Sequence[str]) -> list[str]:
    """Return the ssh command line that runs ``words`` on the host, without a password."""
    argv = ["ssh", "-T", "-a", "-x"]
    if host.config is not None:
        argv += ["-F", str(host.config)]
    if host.identity is not None:
        argv += ["-i", _literal(host.identity)]
    options = [
        "LogLevel=ERROR",
        "ControlMaster=no",
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
        "RemoteCommand=none",
        f"ConnectTimeout={CONNECT_TIMEOUT_S}",
        # As libssh: a key that is not known is not accepted, and nobody can be asked.
        "StrictHostKeyChecking=yes",
        "UpdateHostKeys=no",
    ]
    if host.known_hosts is not None:
        # The value is a list of names: one with a space is quoted.
        options.append(f'UserKnownHostsFile="{_literal(host.known_hosts)}"')
    if host.secret is None:
        options.append("BatchMode=yes")
    else:
        options += ["BatchMode=no", "NumberOfPasswordPrompts=1"]
    for option in options:
        argv += ["-o", option]
    if host.user is not None:
        argv += ["-l", host.user]
    if host.port is not None:
        argv += ["-p", str(host.port)]
    # What follows is one string to the shell of the other side.
    return [*argv, "--", host.host, " ".join(words)]


async def run(
    host: SshHost,
    words: Sequence[str],
    *,
    most: int,
    doing: str,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> process.Completed:
    """Run a command on the host; ``words`` are for its shell (quote what is not meant for it).

    At most ``most`` bytes of its output are taken.

    Raises:
        SourceError: the login failed, or there was no end of it; ``doing`` says what was tried.
        DependencyError: ssh is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="v2v-ssh.") as made:
        folder = Path(made)
        environment = {"SSH_ASKPASS_REQUIRE": "never"}
        with password_file(host, folder) as password:
            if password is not None:
                # ssh takes a password only from a program that it runs.
                asked = folder / "askpass"
                asked.write_text(f"#!/bin/sh\nexec cat {shlex.quote(str(password))}\n")
                asked.chmod(0o700)
                environment = {"SSH_ASKPASS": str(asked), "SSH_ASKPASS_REQUIRE": "force"}
            completed = await _bounded(
                command(host, words), environment, most=most, timeout_s=timeout_s, host=host,
                doing=doing,
            )  # fmt: skip
    if completed.status == 255:
        # ssh's own failures; commands that we run do not end so.
        raise host.failure(completed.stderr, doing=doing)
    return completed


async def _bounded(
    argv: Sequence[str],
    environment: dict[str, str],
    *,
    most: int,
    timeout_s: float,
    host: SshHost,
    doing: str,
) -> process.Completed:
    child = await process.start(argv, environment=environment)
    assert child.stdout is not None
    assert child.stderr is not None
    taken = {"stdout": bytearray(), "stderr": bytearray()}

    too_much: list[int] = []

    async def drain(name: str, stream: anyio.abc.ByteReceiveStream, limit: int) -> None:
        # To the end in any case: asyncio closes a pipe only where it has seen that.
        async for chunk in stream:
            if too_much:
                continue
            taken[name] += chunk
            if len(taken[name]) > limit:
                too_much.append(limit)
                await process.end(child, grace_s=1.0)

    try:
        with anyio.fail_after(timeout_s):
            async with anyio.create_task_group() as group:
                group.start_soon(drain, "stdout", child.stdout, most)
                group.start_soon(drain, "stderr", child.stderr, _MOST_ERRORS)
            status = await child.wait()
    except TimeoutError:
        raise SourceError(
            f"{doing}: ‘{host.shown}’ did not answer within {timeout_s:.0f} s",
            hint="check that the same command works by hand",
        ) from None
    finally:
        await process.end(child, grace_s=1.0)
        with anyio.CancelScope(shield=True):
            await child.stdout.aclose()
            await child.stderr.aclose()
    if too_much:
        raise SourceError(f"{doing}: ‘{host.shown}’ sent more than {too_much[0]} bytes")
    return process.Completed(
        status,
        taken["stdout"].decode(errors="replace"),
        taken["stderr"].decode(errors="replace"),
    )


def _literal(path: Path) -> str:
    """Keep ssh and libssh from expanding what looks like a token in a file's name."""
    return os.fspath(path).replace("%", "%%")
