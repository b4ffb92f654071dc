"""A real sshd for tests: a loopback port, keys and a host key of its own, nothing of the user's.

::

    with running_sshd(folder) as server:
        InputOptions("vmx", (server.uri("/x/guest.vmx"),), options=server.io_options, ...)

``kill`` ends the listener and every session at once, as a host that loses its power;
``start`` has it listen again on the same port, with the same host key.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.conftest import IS_CI, require
from tests.waiting import wait_until

SSHD = "/usr/sbin/sshd"
_SFTP_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server")


@dataclass
class Sshd:
    """An sshd in ``folder``; ``password``: it takes that, and no key."""

    folder: Path
    port: int
    password: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    listener: subprocess.Popen[bytes] | None = None
    host: str = "127.0.0.1"

    @property
    def user(self) -> str:
        """Who logs in: whoever runs the tests."""
        return getpass.getuser()

    @property
    def config(self) -> Path:
        """A client's configuration that knows the host and has the key."""
        return self.folder / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        """The host's key, as clients keep it."""
        return self.folder / "known_hosts"

    @property
    def identity(self) -> Path:
        """The private key that may log in."""
        return self.folder / "id"

    @property
    def io_options(self) -> tuple[tuple[str, str], ...]:
        """What ``-io`` needs; nothing of the user's own configuration is read."""
        options = (
            ("ssh-config", str(self.folder / "empty_config")),
            ("ssh-known-hosts", str(self.known_hosts)),
        )
        return options if self.password else (*options, ("ssh-identity", str(self.identity)))

    def uri(self, path: str | Path) -> str:
        """Return the address of a file."""
        return f"ssh://{self.user}@{self.host}:{self.port}{quote(str(path))}"

    def start(self) -> None:
        """Listen (again)."""
        argv = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if self.password:
            # Its password holds in a view of the file system of its own.
            shadow = f"mount --bind '{self.folder / 'shadow'}' /etc/shadow"
            argv = ["unshare", "-m", "sh", "-c", f'{shadow} && exec "$@"', "sh", *argv]
        with (self.folder / "sshd.log").open("ab") as log:
            self.listener = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(self._listens, lambda: f"sshd listens: {self.log()}", of=self.listener)

    def kill(self) -> None:
        """Kill it and all its sessions."""
        if self.listener is None:
            return
        family = [self.listener.pid, *_descendants(self.listener.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.listener.wait()
        self.listener = None

    def sessions(self) -> int:
        """Return how many processes of sessions there are."""
        return len(_descendants(self.listener.pid)) if self.listener else 0

    def log(self) -> str:
        """Return what it said."""
        return (self.folder / "sshd.log").read_text(errors="replace")

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
            return True
        return False


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _key(path: Path) -> str:
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text().strip()


def require_sshd() -> None:
    """Skip the test by name without OpenSSH's server; in CI that is a failure."""
    require(SSHD, "ssh", "ssh-keygen")


@contextlib.contextmanager
def running_sshd(
    folder: Path, *, password: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Sshd]:
    """Have an sshd; its files are in ``folder/sshd``. ``environment`` is its sessions'."""
    require_sshd()
    home = folder / "sshd"
    home.mkdir(mode=0o700)
    server = Sshd(home, _free_port(), password, environment or {})
    _configure(server)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _configure(server: Sshd) -> None:
    home = server.folder
    host_key = _key(home / "host_key")
    (home / "authorized_keys").write_text(_key(server.identity) + "\n")
    server.known_hosts.write_text(f"[{server.host}]:{server.port} {host_key}\n")
    (home / "empty_config").touch()
    server.config.write_text(
        f"Host *\n  IdentityFile {server.identity}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {server.known_hosts}\n"
    )
    sftp = next((path for path in _SFTP_SERVERS if Path(path).exists()), "internal-sftp")
    lines = [
        f"ListenAddress {server.host}:{server.port}",
        f"HostKey {home}/host_key",
        f"AuthorizedKeysFile {home}/authorized_keys",
        f"PidFile {home}/pid",
        # /var/tmp is everybody's to write in.
        "StrictModes no",
        "UsePAM no",
        "PermitRootLogin yes",
        "MaxStartups 100",
        "MaxSessions 100",
        f"PasswordAuthentication {'yes' if server.password else 'no'}",
        f"PubkeyAuthentication {'no' if server.password else 'yes'}",
        "KbdInteractiveAuthentication no",
        f"Subsystem sftp {sftp}",
    ]
    # A session's shell reads the .bashrc of its home, and what that does can take its time.
    environment = {"HOME": str(home), **server.environment}
    lines.append("SetEnv " + " ".join(f"{name}={value}" for name, value in environment.items()))
    (home / "sshd_config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        # Where it puts its unprivileged half; the packages' start-up script makes it.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    if server.password:
        _set_password(server)


def _set_password(server: Sshd) -> None:
    probe = ["unshare", "-m", "mount", "--bind", "/dev/null", "/etc/shadow"]
    if os.geteuid() != 0 or not shutil.which("openssl") or subprocess.run(probe).returncode != 0:
        text = "a login by password needs root and mount namespaces"
        if IS_CI:
            pytest.fail(text)
        pytest.skip(text)
    assert server.password is not None
    hashed = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"],
        input=server.password,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shadow = server.folder / "shadow"
    shadow.touch(mode=0o600)
    shadow.write_text(f"{server.user}:{hashed}:19000:0:99999:7:::\n")
