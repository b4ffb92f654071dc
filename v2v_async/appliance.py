"""libguestfs and its appliance: the only module that imports ``guestfs``.

The binding is the distribution's (python3-guestfs, not on PyPI), so it is imported where it is used
and its absence is an error that says what to install.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from v2v_async.errors import DependencyError, V2VError
from v2v_async.process import describe_status, run

LAUNCH_LIMIT_S = 600.0
"""The first launch builds the appliance (half a minute), then boots it, perhaps emulated."""

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
