"""The trial of KVM, with stand-ins for qemu that behave as real ones were seen to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shutil import which

import anyio
import pytest

from tests.waiting import until, wait_until
from v2v_async import kvm
from v2v_async.kvm import KvmState, KvmStatus, appliance_environment, judge, probe_kvm
from v2v_async.process import start_time

BOOTS = """\
echo '[    0.000000] Linux version 6.1.0'
echo '[    1.100000] Kernel panic - not syncing: VFS: Unable to mount root fs'
"""
HANGS = "echo 'Probing EDD (edd=off to disable)... ok'; sleep 600"
SPINS = "echo 'Probing EDD (edd=off to disable)... ok'; while :; do :; done"
HANGS_LATER = "echo 'Linux version 6.1.0'; sleep 600"
ABORTS = "echo 'kvm_buf_set_msrs: Assertion failed' >&2; kill -ABRT $$"
REFUSES = "echo 'qemu: failed to initialize kvm: Operation not permitted' >&2; exit 1"
RESTARTS = "echo 'Probing EDD (edd=off to disable)... ok'"


class Host:
    """A machine with a device, a kernel, a qemu of our making and an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = folder / "kvm"
        self.kernel = folder / "vmlinuz"
        self.qemu = folder / "qemu"
        self.cache = folder / "cache"
        self.device.touch()
        self.kernel.touch()

    def install(self, script: str) -> None:
        self.qemu.write_text(f'#!/bin/sh\necho $$ >>"{self.folder}/starts"\n{script}\n')
        self.qemu.chmod(0o755)

    def probe(self) -> KvmStatus:
        return anyio.run(
            partial(
                probe_kvm,
                self.cache,
                device=self.device,
                qemu=str(self.qemu),
                kernel=self.kernel,
            )
        )

    @property
    def started(self) -> list[int]:
        """The processes that trials were."""
        path = self.folder / "starts"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(kvm, "SILENCE_S", 1.0)
    monkeypatch.setattr(kvm, "SPIN_S", 0.3)
    monkeypatch.setattr(kvm, "_LOOK_S", 0.05)
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("script", "state", "reason"),
    [
        pytest.param(BOOTS, "works", "started", id="boots"),
        pytest.param(HANGS, "broken", "before its first message", id="hangs at once"),
        pytest.param(SPINS, "broken", "before its first message", id="spins at once"),
        pytest.param(HANGS_LATER, "broken", "after its first messages", id="hangs later"),
        pytest.param(ABORTS, "broken", "SIGABRT (kvm_buf_set_msrs", id="qemu aborts"),
        pytest.param(REFUSES, "broken", "Operation not permitted", id="qemu refuses"),
        pytest.param(RESTARTS, "broken", "restarts", id="restarts at once"),
    ],
)
def test_trial(host: Host, script: str, state: KvmState, reason: str) -> None:
    host.install(script)
    status = host.probe()
    assert status.state == state
    assert reason in status.reason
    assert status.is_usable == (state == "works")
    assert [pid for pid in host.started if start_time(pid) is not None] == []


def test_a_kernel_that_never_ends_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "LIMIT_S", 1.0)
    host.install("while :; do echo again; sleep 0.1; done")
    assert host.probe().state == "broken"
    assert start_time(host.started[0]) is None


def test_result_is_remembered(host: Host) -> None:
    host.install(BOOTS)
    first = host.probe()
    assert host.probe() == first
    assert len(host.started) == 1


def test_another_qemu_is_tried_again(host: Host) -> None:
    host.install(REFUSES)
    assert host.probe().state == "broken"
    host.install(BOOTS)
    assert host.probe().state == "works"


def test_another_boot_is_tried_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.install(BOOTS)
    host.probe()
    monkeypatch.setattr(kvm, "_boot_id", lambda: "another")
    host.probe()
    assert len(host.started) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fact": {"state": "perfect"}}'])
def test_damaged_memory_is_ignored(host: Host, content: str) -> None:
    host.install(BOOTS)
    host.probe()
    for remembered in host.cache.iterdir():
        remembered.write_text(content)
    assert host.probe().state == "works"
    assert len(host.started) == 2


def test_a_cache_that_cannot_be_made(host: Host) -> None:
    host.install(BOOTS)
    host.cache.write_text("a file where the folder should be")
    assert host.probe().state == "works"


def test_no_device(host: Host) -> None:
    host.install(BOOTS)
    host.device.unlink()
    assert host.probe().state == "absent"
    assert host.started == []


def test_device_of_somebody_else(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.install(BOOTS)

    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    # Not by its mode: root may open anything.
    monkeypatch.setattr(os, "open", refuse)
    assert kvm._device_status(host.device) == KvmStatus(
        "denied", f"{host.device} can't be opened by this user (group kvm)"
    )


def test_no_qemu_and_no_kernel(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "find_qemu", lambda: None)
    probe = partial(probe_kvm, host.cache, device=host.device)
    assert anyio.run(probe).state == "unknown"
    host.install(BOOTS)
    monkeypatch.setattr(kvm, "find_qemu", lambda: str(host.qemu))
    monkeypatch.setattr(kvm, "find_kernel", lambda: None)
    assert anyio.run(probe).state == "unknown"
    # A kernel may be installed any time: this is not remembered.
    assert not host.cache.exists()


def test_cancelled_trial_leaves_nothing(host: Host) -> None:
    host.install(f'sleep 600 & echo $! >>"{host.folder}/starts"; wait')

    async def cancel_soon() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(
                partial(
                    probe_kvm,
                    host.cache,
                    device=host.device,
                    qemu=str(host.qemu),
                    kernel=host.kernel,
                )
            )
            await until(lambda: len(host.started) == 2, "the trial has begun")
            group.cancel_scope.cancel()

    anyio.run(cancel_soon)
    # The sleep is reaped by init, a moment after it was killed.
    wait_until(
        lambda: not any(start_time(pid) is not None for pid in host.started),
        "the trial’s processes have gone",
        within_s=5,
    )
    assert not host.cache.exists()


FORCED = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("works", {}),
        ("absent", {}),
        ("unknown", {}),
        ("denied", FORCED),
        ("broken", FORCED),
    ],
)
def test_environment(state: KvmState, expected: Mapping[str, str]) -> None:
    assert appliance_environment(KvmStatus(state, ""), {}) == expected


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        pytest.param(
            {"LIBGUESTFS_BACKEND": "libvirt"},
            {"LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"},
            id="another backend",
        ),
        pytest.param(
            {"LIBGUESTFS_BACKEND_SETTINGS": "force_kvm"},
            {"LIBGUESTFS_BACKEND": "direct"},
            id="the user knows better",
        ),
        pytest.param(
            {"LIBGUESTFS_BACKEND_SETTINGS": "network_bridge=br0"},
            {
                "LIBGUESTFS_BACKEND": "direct",
                "LIBGUESTFS_BACKEND_SETTINGS": "network_bridge=br0:force_tcg",
            },
            id="another setting",
        ),
        pytest.param(FORCED, {}, id="done already"),
    ],
)
def test_environment_keeps_the_users(users: Mapping[str, str], expected: Mapping[str, str]) -> None:
    assert appliance_environment(KvmStatus("broken", ""), users) == expected


def test_judge_needs_more_than_the_first_line() -> None:
    assert judge(b"Linux version 6.1", None, "").state == "broken"
    assert judge(b"Linux version 6.1\nKernel panic - not syncing", None, "").state == "works"


def test_newest_kernel_is_by_number() -> None:
    names = ["vmlinuz-6.9.1-amd64", "vmlinuz-6.10.2-amd64", "vmlinuz-5.10.0-amd64"]
    newest = max((Path("/boot", name) for name in names), key=kvm._version)
    assert newest.name == "vmlinuz-6.10.2-amd64"


@pytest.mark.slow
def test_real_kernel(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command line, but emulated: a kernel that starts is recognised."""
    qemu, kernel = kvm.find_qemu(), kvm.find_kernel()
    if qemu is None or kernel is None or which("bash") is None:
        if os.environ.get("V2V_REQUIRE_TOOLS"):
            pytest.fail("needs qemu and a kernel")
        pytest.skip("needs qemu and a kernel")
    host.kernel = kernel
    for name in ("SILENCE_S", "SPIN_S", "LIMIT_S"):
        monkeypatch.setattr(kvm, name, 120.0)
    host.qemu.write_text(f'#!/bin/bash\nexec {qemu} "${{@/#kvm/tcg}}"\n')
    host.qemu.chmod(0o755)
    assert host.probe() == KvmStatus("works", "a kernel started under it")
