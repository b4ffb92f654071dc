"""Batches of small guests with replayed conversions, run by the real command in a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import assert_gone, program
from tests.fault.test_guest_faults import REPLAY
from tests.integration.servers import MIB, digest, fragmented
from tests.waiting import wait_until
from v2v_async.events import Event

CONVERTED = b"converted" + bytes(4087)
TIMEOUT_S = 300


class Batch:
    """Guests ``g1`` … with disks of their own, a plan, and the folders of a user."""

    def __init__(self, folder: Path, count: int, *, disks: int = 2, size: int = 8 * MIB) -> None:
        self.folder = folder
        self.tmp, self.out, self.sources = folder / "tmp", folder / "out", folder / "src"
        for path in (self.tmp, self.out, self.sources):
            path.mkdir()
        self.disks = {
            f"g{guest}": [
                fragmented(self.sources / f"g{guest}-{disk}.img", size, seed=guest * 100 + disk)
                for disk in range(1, disks + 1)
            ]
            for guest in range(1, count + 1)
        }
        self.sources_by_guest: dict[str, str] = {}
        self.remember_sources()
        self.environment = {
            # With the cache of the machine, which knows whether KVM works: each run would try.
            **{name: value for name, value in os.environ.items() if name != "V2V_ASYNC_CACHE"},
            "PATH": f"{REPLAY}:{os.environ['PATH']}",
            "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg",
            # The appliance is found and not built anew; it would stay in TMPDIR, too.
            "LIBGUESTFS_CACHEDIR": os.environ.get("LIBGUESTFS_CACHEDIR", "/var/tmp"),
            "TMPDIR": str(self.tmp),
            "V2V_ASYNC_STATE": str(folder / "state"),
        }
        self.plan = folder / "plan.toml"
        self.write_plan()

    def write_plan(self, head: str = "", more: dict[str, str] | None = None) -> None:
        """Write the plan: ``head`` before the guests, ``more`` TOML lines by guest.

        ``sources_by_guest`` has TOML lines in place of the disks' files.
        """
        lines = [head, "[defaults.output]", 'type = "local"', f'storage = "{self.out}"']
        for name, disks in self.disks.items():
            paths = json.dumps([str(disk) for disk in disks])
            files = f'input = {{ type = "disk", source = {paths} }}'
            lines += [
                "[[guests]]",
                f'name = "{name}"',
                f'output = {{ name = "{name}" }}',
                (more or {}).get(name, ""),
                self.sources_by_guest.get(name, files),
            ]
        self.plan.write_text("\n".join(lines) + "\n")

    def remember_sources(self) -> None:
        """Note what the sources hold now, and must still hold at the end."""
        self.before = self._source_state()

    def command(self, *words: str) -> list[str]:
        """Return ``v2v-async batch WORDS``."""
        return [*program("v2v-async"), "batch", *words]

    def batch(self, *words: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run ``v2v-async batch WORDS`` to its end."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=self.folder,
        )
        if status is not None:
            assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
        return done

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start ``v2v-async batch WORDS`` and go on."""
        return subprocess.Popen(
            self.command(*words),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )

    def events(self, run: str = "r") -> list[Event]:
        """Return all events of a run so far."""
        path = self.run(run) / "events.jsonl"
        if not path.exists():
            return []
        text = path.read_text()
        return [
            Event.from_json(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"
        ]

    def run(self, run: str = "r") -> Path:
        """Return a run's folder."""
        return self.folder / "state" / "batch" / run

    def status(self, run: str = "r") -> dict[str, Any]:
        """Return what ``status --json`` says."""
        found: dict[str, Any] = json.loads(self.batch("status", run, "--json").stdout)
        return found

    def phases(self, run: str = "r") -> dict[str, str]:
        """Return each guest's phase."""
        return {guest["name"]: guest["phase"] for guest in self.status(run)["guests"]}

    def await_event(
        self, process: subprocess.Popen[str], wanted: Callable[[Event], bool], run: str = "r"
    ) -> Event:
        """Wait until an event is in the run's file."""

        def output() -> str:
            process.kill()
            return f"the event is there: {process.communicate()[0]}"

        return wait_until(
            lambda: next(filter(wanted, self.events(run)), None),
            output,
            within_s=TIMEOUT_S,
            of=process,
        )

    def kill(self, process: subprocess.Popen[str]) -> None:
        """End a supervisor as a loss of power would, and wait until its servers are gone."""
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def assert_converted(self, *names: str) -> None:
        """Assert that these guests are there, and right."""
        for name in names:
            for letter, disk in zip("abcd", self.disks[name], strict=False):
                content = bytearray(disk.read_bytes())
                content[MIB : MIB + 4096] = CONVERTED
                made = (self.out / f"{name}-sd{letter}").read_bytes()
                assert made == bytes(content), f"{name}, disk {letter}"

    def assert_nothing_left(self, *names: str) -> None:
        """Assert that the outputs are those of ``names``, and that nothing else is left."""
        assert_gone(str(self.tmp))
        assert_gone(str(self.out))
        wanted = sorted(
            file
            for name in names
            for file in [
                f"{name}.xml",
                *(
                    f"{name}-sd{letter}"
                    for letter, _ in zip("abcd", self.disks[name], strict=False)
                ),
            ]
        )
        assert sorted(path.name for path in self.out.iterdir()) == wanted
        assert sorted(str(path.relative_to(self.tmp)) for path in self.tmp.rglob("*")) == []
        assert self._source_state() == self.before

    def _source_state(self) -> list[tuple[str, int]]:
        return [
            (digest(disk), disk.stat().st_mtime_ns)
            for disks in self.disks.values()
            for disk in disks
        ]
