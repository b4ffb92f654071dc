"""Doctor: what it finds, what it says, and its exit status."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest
from rich.console import Console

from v2v_async import appliance, doctor, kvm, needs
from v2v_async.cli import doctor as cli
from v2v_async.doctor import Finding, Report, examine
from v2v_async.errors import DependencyError, V2VError
from v2v_async.kvm import KvmStatus
from v2v_async.needs import Package, parse_version

NBDKIT = Package("nbdkit", "nbdkit-server")


@pytest.fixture(autouse=True)
def quick_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(cache: Path | None = None) -> KvmStatus:
        return KvmStatus("broken", "made up")

    monkeypatch.setattr(kvm, "probe_kvm", probe)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in the PATH; empty at first but for a package manager."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("V2V_ASYNC_CACHE", str(tmp_path / "cache"))
    install(folder, "apt-get", "")
    return folder


def install(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def look() -> Report:
    return anyio.run(examine)


def find(report: Report, name: str, group: str = "") -> Finding:
    return next(f for f in report.findings if f.name == name and group in ("", f.group))


def test_nothing_installed(programs: Path) -> None:
    report = look()
    assert not report.is_ok
    for program in needs.PROGRAMS:
        # One of them is also looked for outside the PATH.
        if not program.also_at:
            assert find(report, program.name).state == "missing"
    (install_needed,) = (c for c in report.commands(needed=True) if "apt-get" in c)
    assert install_needed.startswith("sudo " if os.getuid() else "apt-get install")
    assert {"nbdkit", "qemu-utils", "util-linux"} <= set(install_needed.split())
    assert "libnbd-bin" not in install_needed
    assert any("libnbd-bin" in command for command in report.commands(needed=False))


def test_too_old(programs: Path) -> None:
    install(programs, "nbdkit", "echo nbdkit 1.20.4")
    finding = find(look(), "nbdkit")
    assert (finding.state, finding.version) == ("old", "1.20.4")
    assert finding.is_fatal


def test_program_that_fails(programs: Path) -> None:
    install(programs, "qemu-img", "exit 3")
    assert find(look(), "qemu-img").state == "warning"


def test_program_that_never_answers(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ASK_LIMIT_S", 0.5)
    install(programs, "qemu-img", "exec /bin/sleep 600")
    began = time.monotonic()
    assert find(look(), "qemu-img").state == "warning"
    assert time.monotonic() - began < 60


def test_plugins_and_filters(programs: Path, tmp_path: Path) -> None:
    install(
        programs,
        "nbdkit",
        f"""
        case $* in
        --version) echo nbdkit 1.40.1 ;;
        --dump-config) echo plugindir={tmp_path}/p; echo filterdir={tmp_path}/f ;;
        "curl --dump-plugin") echo path=x; echo version=1.40.1 ;;
        *) echo "libsomething.so: cannot open shared object file" >&2; exit 1 ;;
        esac
        """,
    )
    for part in ("p/nbdkit-curl-plugin.so", "p/nbdkit-file-plugin.so", "f/nbdkit-cow-filter.so"):
        path = tmp_path / part
        path.parent.mkdir(exist_ok=True)
        path.touch()
    report = look()
    assert (find(report, "curl").state, find(report, "curl").version) == ("ok", "1.40.1")
    # There, but it does not load; and it is needed.
    assert find(report, "file").is_fatal
    assert "can't be loaded" in find(report, "file").detail
    assert find(report, "nbd", "plugins").is_fatal
    assert find(report, "cow").state == "ok"
    assert (find(report, "retry").state, find(report, "retry").is_fatal) == ("missing", False)
    # Debian has no package of it, so there is no command to offer.
    assert find(report, "vddk").fix is None


def test_binding_that_only_the_distributions_python_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(other))
    binding = replace(needs.BINDINGS[0], code="print('1.2.3')")
    (finding,) = anyio.run(doctor._look_at_binding, binding)
    assert finding.state == "missing"
    assert finding.fix == "./scripts/setup"
    assert "/usr/bin/python3 has it" in finding.detail


def test_no_kernel(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    monkeypatch.setattr(kvm, "find_kernel", lambda: None)
    monkeypatch.delenv("LIBGUESTFS_PATH", raising=False)
    assert find(look(), "kernel").is_fatal
    monkeypatch.setenv("LIBGUESTFS_PATH", "/somewhere")
    assert find(look(), "kernel").state == "ok"


def test_broken_kvm_is_a_warning(programs: Path) -> None:
    finding = find(look(), "KVM")
    assert finding.state == "warning"
    assert not finding.is_fatal
    assert "made up" in finding.detail


def test_little_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(doctor, "LOW_SPACE", 1 << 62)
    assert doctor._look_at_space().state == "warning"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert doctor._look_at_space().is_fatal


def test_appliance_is_tried_once(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    tries = []

    async def launch(environment: dict[str, str]) -> float:
        tries.append(environment)
        return 12.34

    monkeypatch.setattr(appliance, "version", lambda: (1, 48, 6))
    monkeypatch.setattr(appliance, "try_launch", launch)
    monkeypatch.delenv("LIBGUESTFS_BACKEND", raising=False)
    monkeypatch.delenv("LIBGUESTFS_BACKEND_SETTINGS", raising=False)
    assert find(look(), "appliance").state == "unknown"
    assert find(anyio.run(partial(examine, with_appliance=True)), "appliance").state == "ok"
    assert tries == [{"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg"}]
    remembered = find(look(), "appliance")
    assert (remembered.state, remembered.detail) == ("ok", "started in 12.3 s")
    assert len(tries) == 1


def test_appliance_that_does_not_start(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    async def launch(environment: dict[str, str]) -> float:
        raise V2VError("supermin failed")

    monkeypatch.setattr(appliance, "version", lambda: (1, 48, 6))
    monkeypatch.setattr(appliance, "try_launch", launch)
    finding = find(anyio.run(partial(examine, with_appliance=True)), "appliance")
    assert finding.is_fatal
    assert finding.detail == "supermin failed"


def test_without_the_guestfs_binding(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    def absent() -> tuple[int, int, int]:
        raise DependencyError("no binding")

    monkeypatch.setattr(appliance, "version", absent)
    assert find(look(), "appliance").state == "unknown"


def test_commands_by_package_manager() -> None:
    missing = Finding("programs", "nbdkit", "missing", True, package=NBDKIT, fix="x")
    assert Report((missing,), "apt").commands(needed=True)[0].split()[-1] == "nbdkit"
    assert Report((missing,), "dnf").commands(needed=True)[0].split()[-1] == "nbdkit-server"


def test_json(
    programs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert document["ok"] is False
    by_name = {finding["name"]: finding for finding in document["findings"]}
    assert by_name["nbdkit"]["state"] == "missing"
    assert by_name["nbdkit"]["package"] == "nbdkit"
    assert "nbdkit" in by_name["nbdkit"]["fix"]


def show(report: Report, *, quiet: bool = False) -> str:
    stream = io.StringIO()
    cli.show(report, Console(file=stream, width=120), quiet=quiet)
    return stream.getvalue()


def test_table() -> None:
    fine = Finding("programs", "nbdkit", "ok", True, "1.32.5", "/usr/bin/nbdkit")
    text = show(Report((fine,), "apt"))
    assert "1.32.5" in text
    assert "Everything that v2v-async needs is here." in text
    assert show(Report((fine,), "apt"), quiet=True) == ""
    lost = Finding("programs", "qemu-img", "missing", True, "", "", NBDKIT, "x")
    text = show(Report((fine, lost), "apt"), quiet=True)
    assert "qemu-img" in text
    assert "1.32.5" not in text
    assert "apt-get install --no-install-recommends nbdkit" in text


def test_table_does_not_break_commands() -> None:
    long = Package(" ".join(f"package{number}" for number in range(30)), "")
    lost = Finding("programs", "qemu-img", "missing", True, "", "", long, "x")
    assert long.apt in show(Report((lost,), "apt"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbdkit 1.32.5 (nbdkit-1.32.5-1)", (1, 32, 5)),
        ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\n", (7, 2, 22)),
        ("setpriv from util-linux 2.38.1", (2, 38, 1)),
        ("virt-v2v-in-place 2.10.0", (2, 10, 0)),
        ("nothing", ()),
    ],
)
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert parse_version(text) == expected


def test_this_machine_is_quick(tmp_path: Path) -> None:
    # 1.3 s on two cores with a load of 6; the bound only has to notice a wait for something.
    began = time.monotonic()
    anyio.run(partial(examine, cache=tmp_path))
    assert time.monotonic() - began < 20
