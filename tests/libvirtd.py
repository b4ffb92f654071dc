"""A real session libvirtd, as a user of its own: root can't have one, but can connect to it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USER = "nobody"


@contextlib.contextmanager
def session_libvirtd(folder: Path) -> Iterator[str]:
    """Run libvirtd in ``folder``, which ``nobody`` gets; yield the URI to connect to.

    Every guest that it started is gone at the end.
    """
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    (folder / "home").mkdir()
    argv = ["libvirtd", "-t", "900"]
    environment = {
        "HOME": str(folder / "home"),
        "XDG_RUNTIME_DIR": str(runtime),
        "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
    }
    if os.geteuid() == 0:
        user = pwd.getpwnam(USER)
        for path in (folder, runtime, folder / "home"):
            os.chown(path, user.pw_uid, user.pw_gid)
        ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        argv = ["setpriv", *ids, *argv]
    log = (folder / "libvirtd.log").open("wb")
    server = subprocess.Popen(
        argv, env=environment, stdout=log, stderr=log, start_new_session=True, cwd="/"
    )
    socket = runtime / "libvirt" / "libvirt-sock"
    uri = f"qemu+unix:///session?socket={socket}"
    try:
        end = time.monotonic() + 60
        while not socket.exists():
            assert server.poll() is None, (folder / "libvirtd.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
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
        log.close()


@contextlib.contextmanager
def connection(uri: str) -> Iterator[Any]:
    """Have libvirt's own connection."""
    import libvirt

    opened = libvirt.open(uri)
    try:
        yield opened
    finally:
        opened.close()


def is_there() -> bool:
    """Whether this machine can run one."""
    path = os.environ["PATH"] + ":/usr/sbin"
    return all(shutil.which(name, path=path) for name in ("libvirtd", "qemu-system-x86_64"))
