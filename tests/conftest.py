"""What all tests share: the event loop, real guests, and the proof that nothing is left behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_until
from v2v_async.v2vdir import V2VDir

ROOT = Path(__file__).resolve().parent.parent
CONVERTING_ONCE = ROOT / "tests" / "converting_once"
# What a helper asserts is told as fully as what a test asserts; waiting.py, needed here, says it.
_HELPERS = {path.stem for path in Path(__file__).parent.glob("*.py")}
_HELPERS -= {"__init__", "conftest", "waiting"}
pytest.register_assert_rewrite(*(f"tests.{name}" for name in sorted(_HELPERS)))

IS_CI = os.environ.get("CI") == "true" or os.environ.get("V2V_REQUIRE_TOOLS") == "1"


def pytest_configure() -> None:
    """Let the programs under test get their signals, and start fast.

    A background job of a script starts with SIGINT ignored, nohup ignores SIGHUP, and both are
    inherited; the programs rightly keep to that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Hundreds of programs are started, and to compile everything anew each time costs 0.7 s.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def anyio_backend() -> str:
    """The supervisor runs on asyncio."""
    return "asyncio"


def require(*programs: str) -> None:
    """Skip the test by name where a program is missing; in CI that is a failure."""
    # Where daemons are is not in everybody's PATH.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if not missing:
        return
    text = f"not installed: {', '.join(missing)} (run scripts/setup)"
    if IS_CI:
        pytest.fail(text)
    pytest.skip(text)


def processes_naming(text: str) -> list[str]:
    """Return the command lines of live processes that name ``text``, but for our own family."""
    ours = {os.getpid(), os.getppid()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours:
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text in line and state != "Z":
            found.append(f"{entry.name}: {line}")
    return found


def assert_gone(text: str, *, within_s: float = 10.0) -> None:
    """Assert that no process names ``text`` any more; a process that is just ending may end."""
    wait_until(
        lambda: not processes_naming(text),
        lambda: f"nothing left behind: {processes_naming(text)}",
        within_s=within_s,
    )


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory with a name short enough for Unix sockets; nothing may be left running in it."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="vt.", dir="/var/tmp"))
    yield path
    try:
        assert_gone(str(path))
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def v2vdir(short_tmp: Path) -> Iterator[V2VDir]:
    """A v2v directory; its servers must have been stopped at the end."""
    made = V2VDir.create(short_tmp)
    yield made
    assert made.state.processes == [], "a server is left"
    made.remove()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory to write to."""
    made = tmp_path / "out"
    made.mkdir()
    return made


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    """Sockets and files that a test opened are closed when it ends."""
    before = _descriptors()
    yield
    gc.collect()  # what is garbage, and only not collected yet, is not left open
    leaked = {fd: name for fd, name in _descriptors().items() if fd not in before}
    sockets = [name for name in leaked.values() if name.startswith(("socket:", "/var/tmp/vt."))]
    assert not sockets, f"descriptors left open: {leaked}"


def _descriptors() -> dict[str, str]:
    names = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names[entry.name] = os.readlink(entry)
        except OSError:
            continue
    return names


def made_guest(script: str, *arguments: str) -> Path:
    """Return the folder of a cached guest, making it where it is absent."""
    completed = subprocess.run(
        [str(ROOT / "scripts" / script), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(completed.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def phony_guest() -> Path:
    """A Debian that inspection and conversion accept and that does not boot."""
    require("virt-v2v-in-place")
    return made_guest("phony-guest", "--kind", "linux")


@pytest.fixture(scope="session")
def three_disk_guest() -> Path:
    """The same with two data disks, the last one qcow2."""
    require("virt-v2v-in-place")
    return made_guest("phony-guest", "--kind", "three-disk")


@pytest.fixture(scope="session")
def no_os_disk() -> Path:
    """A disk without an operating system."""
    return made_guest("phony-guest", "--kind", "no-os") / "system.img"


@pytest.fixture(scope="session")
def sample_guest() -> Path:
    """The real Debian with two data disks."""
    require("virt-v2v-in-place", "qemu-system-x86_64", "debootstrap")
    return made_guest("sample-guest")


@pytest.fixture
def converting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions of the same disks in the same way are done once (tests/converting_once).

    For tests of what is before and behind the conversion; those of the conversion do without.
    """
    monkeypatch.setenv("PATH", f"{CONVERTING_ONCE}:{os.environ['PATH']}")


def program(name: str) -> list[str]:
    """Return the command that runs one of our console scripts."""
    script = Path(sys.executable).parent / name
    if script.exists():
        return [str(script)]
    assert name in ("v2v-async", "virt-v2v-async"), f"{name} is not installed: run scripts/setup"
    return [sys.executable, "-m", "v2v_async", *(["convert"] if name != "v2v-async" else [])]
