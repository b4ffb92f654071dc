"""Real libvirtds: a session's, as a user of its own, and the system's, in namespaces of its own.

Root can't have a session's daemon, but can connect to it. The system's has its files, its users and
its networks for itself: nothing of the machine's is seen or changed, but for empty folders that are
made where a machine without libvirt has none.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

USER = "nobody"
# Below those that the kernel gives to connections.
_FIRST_PORT, _PORTS, _PORT_RANGES = 6000, 20, 1300
BRIDGE = "v2v-br0"
"""There is one in the network namespace of the system's daemon."""


@contextlib.contextmanager
def session_libvirtd(folder: Path) -> Iterator[str]:
    """Run libvirtd in ``folder``, which ``nobody`` gets; yield the URI to connect to.

    Every guest that it started is gone at the end.
    """
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    configuration = folder / "home" / ".config" / "libvirt" / "qemu.conf"
    configuration.parent.mkdir(parents=True)
    # Displays on ports of our own: two daemons that look for a free one at once find the same.
    port = _FIRST_PORT + os.getpid() % _PORT_RANGES * _PORTS
    configuration.write_text(
        f"remote_display_port_min = {port}\nremote_display_port_max = {port + _PORTS - 1}\n"
    )
    argv = ["libvirtd", "-t", "900"]
    environment = {
        "HOME": str(folder / "home"),
        "XDG_RUNTIME_DIR": str(runtime),
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
    }
    if os.geteuid() == 0:
        user = pwd.getpwnam(USER)
        for path in (folder, runtime, *_within(folder / "home")):
            os.chown(path, user.pw_uid, user.pw_gid)
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        argv = ["setpriv", *ids, *argv]
    path = runtime / "libvirt" / "libvirt-sock"
    with _running(folder, argv, environment, path, "session") as uri:
        yield uri


def _within(folder: Path) -> list[Path]:
    return [folder, *folder.rglob("*")]


_PRIVATE = (
    *("/etc/libvirt", "/run/libvirt", "/var/cache/libvirt", "/var/lib/libvirt", "/var/log/libvirt"),
    *("/var/lib/swtpm-localca", "/var/log/swtpm"),
)
_SYSTEM = """
cd "$1"
for folder in $2; do
    mkdir -p "$folder" ".$folder"
    mount --bind ".$folder" "$folder"
done
# Where it keeps the keys that vouch for its TPMs; Debian's swtpm runs as tss.
if id tss >/dev/null 2>&1; then chown tss var/lib/swtpm-localca; fi
cp /etc/passwd passwd
cp /etc/group group
grep -q ^libvirt-qemu: passwd || {
    echo libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin >>passwd
    echo libvirt-qemu:x:64055: >>group
}
mount --bind passwd /etc/passwd
mount --bind group /etc/group
# Without /dev/kvm: where that is there and of no use the daemon tries it again in every call.
mkdir dev
mount -t tmpfs tmpfs dev
mkdir dev/net dev/pts dev/shm
for node in full net/tun null ptmx random tty urandom zero; do
    if [ -e "/dev/$node" ]; then cp -a "/dev/$node" "dev/$node"; fi
done
mount --rbind /dev/pts dev/pts
ln -s /proc/self/fd dev/fd
mount --rbind dev /dev
ip link set lo up
ip link add "$3" type bridge
ip link set "$3" up
exec libvirtd --timeout 900 --config "$1/libvirtd.conf"
"""


@contextlib.contextmanager
def system_libvirtd(folder: Path) -> Iterator[str]:
    """Run the system's libvirtd with all its state in ``folder``; yield the URI. Root only.

    Every guest that it started is gone at the end.
    """
    folder.chmod(0o711)  # qemu runs as a user of its own
    sockets = folder / "sockets"
    sockets.mkdir()
    (folder / "libvirtd.conf").write_text(f'unix_sock_dir = "{sockets}"\n')
    configuration = folder / "etc" / "libvirt" / "qemu.conf"
    configuration.parent.mkdir(parents=True)
    # No virtlogd to write logs, and neither cgroups nor /dev of its own: a container may have none.
    configuration.write_text('stdio_handler = "file"\ncgroup_controllers = []\nnamespaces = []\n')
    environment = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}
    argv = ["unshare", "--mount", "--net", "--propagation", "private"]
    argv += ["sh", "-ec", _SYSTEM, "sh", str(folder), " ".join(_PRIVATE), BRIDGE]
    path = sockets / "libvirt-sock"
    with _running(folder, argv, environment, path, "system") as uri:
        yield uri


@contextlib.contextmanager
def _running(
    folder: Path, argv: list[str], environment: dict[str, str], path: Path, kind: str
) -> Iterator[str]:
    """Run a daemon that will listen on ``path``; yield its URI. Its guests end with it."""
    uri = f"qemu+unix:///{kind}?socket={path}"
    with (folder / "libvirtd.log").open("wb") as log:
        server = subprocess.Popen(
            argv, env=environment, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    try:
        # It would tell systemd that it listens, which did not start it.
        wait_until(
            lambda: _takes(path),
            lambda: f"libvirtd listens: {(folder / 'libvirtd.log').read_text()}",
            within_s=60,
            of=server,
        )
        yield uri
        with connection(uri) as libvirt:
            for domain in libvirt.listAllDomains(0):
                if domain.isActive():
                    domain.destroy()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _takes(path: Path) -> bool:
    """Whether a connection is taken. The daemon may be in another network namespace."""
    with socket.socket(socket.AF_UNIX) as attempt:
        return attempt.connect_ex(str(path)) == 0


@contextlib.contextmanager
def connection(uri: str) -> Iterator[Any]:
    """Have libvirt's own connection."""
    import libvirt

    opened = libvirt.open(uri)
    try:
        yield opened
    finally:
        opened.close()
