"""libguestfs and its appliance: only this and ``appliance_inspect.py`` import ``guestfs``.

The binding is the distribution's (python3-guestfs, not on PyPI), so it is imported where it is used
and its absence is an error that says what to install.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v2v_async.errors import DependencyError, V2VError
from v2v_async.process import describe_status, run

LAUNCH_LIMIT_S = 600.0
"""The first launch builds the appliance (half a minute), then boots it, perhaps emulated."""

INSPECT_LIMIT_S = 1800.0
"""An emulated appliance looks into a guest with many file systems for minutes."""

# A process of its own: a launch that hangs inside the library can only be ended from outside.
_LAUNCH = """\
import sys
import guestfs
handle = guestfs.GuestFS(python_return_dict=True)
handle.add_drive_scratch(1 << 20)
try:
    handle.launch()
    handle.shutdown()
except RuntimeError as error:
    sys.exit(str(error))
"""


def version() -> tuple[int, int, int]:
    """Return libguestfs's version.

    Raises:
        DependencyError: the binding is not there for this Python.
    """
    handle = _handle()
    try:
        found = handle.version()
    finally:
        handle.close()
    return (found["major"], found["minor"], found["release"])


def backend() -> str:
    """Return how libguestfs starts its appliance: ``direct``, ``libvirt``, ….

    Raises:
        DependencyError: the binding is not there for this Python.
    """
    handle = _handle()
    try:
        found: str = handle.get_backend()
    finally:
        handle.close()
    return found


def _handle() -> Any:
    try:
        import guestfs
    except ImportError as error:
        raise DependencyError(
            f"the Python binding of libguestfs can't be loaded: {error}",
            hint="‘v2v-async doctor’ says which package has it",
        ) from error
    return guestfs.GuestFS(python_return_dict=True, close_on_exit=False)


async def try_launch(
    environment: Mapping[str, str] | None = None, *, timeout_s: float = LAUNCH_LIMIT_S
) -> float:
    """Build the appliance if need be, start it, end it, and return the seconds that it took.

    Args:
        environment: variables added to ours (see ``kvm.appliance_environment``).
        timeout_s: after this the appliance and its processes are ended.

    Raises:
        V2VError: it did not start; the message has libguestfs's reason.
    """
    began = time.monotonic()
    try:
        done = await run(
            [sys.executable, "-c", _LAUNCH], environment=environment, timeout_s=timeout_s
        )
    except TimeoutError as error:
        raise V2VError(
            f"libguestfs's appliance did not start within {timeout_s:.0f} s",
            hint="run libguestfs-test-tool(1) and read the end of what it says",
        ) from error
    if done.status != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else describe_status(done.status)
        raise V2VError(
            f"libguestfs's appliance does not start: {reason}",
            hint="run libguestfs-test-tool(1) and read the end of what it says",
        )
    return time.monotonic() - began


async def inspect(
    sockets: Sequence[Path],
    keys: Sequence[Sequence[str]],
    root: str,
    environment: Mapping[str, str] | None = None,
    *,
    timeout_s: float = INSPECT_LIMIT_S,
) -> dict[str, Any]:
    """Look into the disks that NBD servers have at these sockets, read-only.

    Args:
        sockets: in the order of the guest's disks.
        keys: (ID, ``file`` or ``clevis``, file) of what is encrypted.
        root: ``single``, ``first`` or a file system.
        environment: as for :func:`try_launch`.

    Returns:
        ``filesystems`` (device to type), ``locked`` (devices that no key opened), ``roots``,
        ``has_esp``, and ``system`` where ``root`` means one: what guestfs(3) tells of it.

    Raises:
        V2VError: the appliance does not start, or something in it fails.
    """
    request = {"sockets": [str(each) for each in sockets], "keys": keys, "root": root}
    argv = [sys.executable, "-m", "v2v_async.appliance_inspect", json.dumps(request)]
    try:
        done = await run(argv, environment=environment, timeout_s=timeout_s)
    except TimeoutError as error:
        raise V2VError(
            f"the guest was not inspected within {timeout_s:.0f} s",
            hint="run libguestfs-test-tool(1) and read the end of what it says",
        ) from error
    if done.status != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else describe_status(done.status)
        raise V2VError(f"libguestfs can't look into the guest: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
