"""A dask cluster outside of us: a scheduler and workers as a person starts them, on free ports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT
from tests.waiting import wait_until

_HIDING = 'until [ "$1" = -- ]; do mount -t tmpfs none "$1" || exit; shift; done; shift; exec "$@"'
DASK = str(Path(sys.executable).parent / "dask")


class DaskCluster:
    """Made by :func:`dask_cluster`; logs are in ``home``."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._arguments = arguments
        self.uri = ""
        described = home / "scheduler.json"
        self._start(
            "scheduler",
            *("scheduler", "--port", "0", "--host", "127.0.0.1", "--dashboard-address"),
            *("127.0.0.1:0", "--scheduler-file", str(described), *arguments),
        )
        try:
            # It is there before it is written.
            self.wait_for(
                "scheduler", lambda: described.exists() and described.read_text().endswith("}")
            )
            self.uri = str(json.loads(described.read_text())["address"])
        except BaseException:
            self.stop()
            raise

    def worker(
        self,
        name: str,
        resources: str | None = "conversions=1 copies=2",
        *,
        path: str = str(ROOT),
        tmpdir: Path | None = None,
        hidden: Sequence[Path] = (),
        wait: bool = True,
    ) -> int:
        """Start a worker and return its pid; ``path`` is where it finds modules.

        It has directories of its own, and empty ones, in place of those ``hidden`` ones.
        """
        given = [] if resources is None else ["--resources", resources]
        self._start(
            name,
            *("worker", self.uri, "--name", name, "--nthreads", "1", "--no-nanny"),
            *("--local-directory", str(self.home), "--no-dashboard", *given, *self._arguments),
            path=path,
            tmpdir=tmpdir,
            hidden=hidden,
        )
        if wait:
            self.wait_for_worker(name)
        return self.processes[name].pid

    def wait_for_worker(self, name: str) -> None:
        """Wait until the scheduler has a worker."""
        self.wait_for(name, lambda: "Registered to" in self.log(name))

    def wait_for(self, name: str, has_come: Callable[[], bool]) -> None:
        """Wait until one of the processes has come so far."""
        wait_until(
            has_come,
            lambda: f"the {name} is there: {self.log(name)}",
            within_s=40,
            of=self.processes[name],
        )

    def log(self, name: str) -> str:
        """Return what a process of it has said."""
        return (self.home / f"{name}.log").read_text(errors="replace")

    def kill(self, name: str) -> None:
        """Kill one."""
        self.processes[name].kill()

    def stop(self) -> None:
        """End all of them, the scheduler last."""
        scheduler, *workers = self.processes.values()
        for group in (workers, [scheduler]):
            for process in group:
                process.terminate()
            for process in group:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()

    def _start(
        self,
        name: str,
        *arguments: str,
        path: str = str(ROOT),
        tmpdir: Path | None = None,
        hidden: Sequence[Path] = (),
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": path}
        if tmpdir is not None:
            environment["TMPDIR"] = str(tmpdir)
        own = (
            ["unshare", "--mount", "sh", "-c", _HIDING, "sh", *map(str, hidden), "--"]
            if hidden
            else []
        )
        with (self.home / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*own, DASK, *arguments], stdout=log, stderr=log, env=environment, cwd=self.home
            )


@contextmanager
def dask_cluster(home: Path, *arguments: str) -> Iterator[DaskCluster]:
    """Have a scheduler; it and the workers that the test starts end with the block."""
    home.mkdir(exist_ok=True)
    cluster = DaskCluster(home, *arguments)
    try:
        yield cluster
    finally:
        cluster.stop()
