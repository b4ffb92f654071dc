"""The workers of a cluster as the supervisor knows them, and what makes one of use."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from v2v_async import __version__
from v2v_async.batch.cluster.placement import CONVERSIONS, COPIES, Load
from v2v_async.errors import DependencyError, V2VError


@dataclass(slots=True)
class Introduction:
    """What a worker says of itself. ``memory`` is its machine's, in bytes."""

    version: str
    name: str
    host: str
    machine: str
    memory: int
    tmpdir: Path
    resources: dict[str, int]


@dataclass(slots=True)
class Worker:
    """A worker that takes part, from when it is taken in until it is lost.

    ``session`` names that time; a worker that is taken in again begins another one. ``sees``:
    which directories it is known to share with us. ``heard``: when its last answer to a renewal
    came, and ``confirmed`` what its own clock said then (s). ``number``: of its last message.
    """

    introduction: Introduction
    load: Load
    sees: dict[Path, bool] = field(default_factory=dict)
    lost: anyio.Event = field(default_factory=anyio.Event)
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    heard: float = 0.0
    confirmed: float = 0.0
    number: int = 0

    @property
    def address(self) -> str:
        """Where the scheduler reaches it."""
        return self.load.address

    @property
    def label(self) -> str:
        """It, as a person knows it."""
        name, host = self.introduction.name, self.introduction.host
        return f"‘{name}’ on {host}" if name != self.address else f"{name} on {host}"

    def own_path(self, path: Path, run: str, suffix: str = "") -> Path:
        """Return a path of its own for what it does not share: always the same, and short."""
        name = hashlib.sha256(f"{run}\0{path}".encode()).hexdigest()[:16]
        return self.introduction.tmpdir / f"v2v.{name}{suffix}"

    def gone(self) -> V2VError:
        """Return the error of a guest whose worker is lost."""
        return V2VError(
            f"the worker {self.label} went away while it worked on this guest",
            hint=f"was it killed, for want of memory? see its log, and ‘dmesg’ on "
            f"{self.introduction.host}; other workers go on without it",
        )


def introducing() -> Callable[[Any], dict[str, Any]]:
    """Return the function by which a worker says who it is.

    It is made here, so that dask sends its code: v2v-async may be missing there, or another one.
    """

    def introduce(dask_worker: Any) -> dict[str, Any]:
        import os
        import socket
        from pathlib import Path

        told: dict[str, Any] = {
            "version": None,
            "name": str(dask_worker.name),
            "host": socket.gethostname(),
            "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "tmpdir": os.environ.get("TMPDIR") or "/var/tmp",
            "resources": {
                name: int(amount) for name, amount in dask_worker.state.total_resources.items()
            },
            "problem": "",
        }
        try:
            import v2v_async

            told["version"] = v2v_async.__version__
        except ImportError as error:
            told["problem"] = str(error)
        return told

    return introduce


def check_introductions(found: dict[str, Any], uri: str) -> dict[str, Introduction]:
    """Return the introductions of workers by address.

    Raises:
        DependencyError: v2v-async is not there, or another version.
    """
    wrong = []
    known = {}
    for address, told in found.items():
        if isinstance(told, BaseException):
            continue  # it went away before it could answer
        if told["version"] is None:
            wrong.append(f"{address} on {told['host']} has none ({told['problem']})")
        elif told["version"] != __version__:
            wrong.append(f"{address} on {told['host']} has {told['version']}")
        else:
            told = {name: value for name, value in told.items() if name != "problem"}
            known[address] = Introduction(**told | {"tmpdir": Path(told["tmpdir"])})
    if wrong:
        raise DependencyError(
            f"this is v2v-async {__version__}, and of the workers of {uri}, {'; '.join(wrong)}",
            hint="install the same version for all workers, in the Python that runs ‘dask worker’, "
            "and start them again",
        )
    return known


def no_worker(uri: str) -> V2VError:
    """Return the error of a cluster in which nobody can take a guest."""
    return V2VError(
        f"no worker of {uri} has the resources ‘{CONVERSIONS}’ and ‘{COPIES}’",
        hint=f'start workers that have: dask worker {uri} --resources "{CONVERSIONS}=1 {COPIES}=4"',
    )
