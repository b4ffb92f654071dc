"""Starting libguestfs's appliance, with stand-ins for the binding."""

from __future__ import annotations

import builtins
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from v2v_async import appliance
from v2v_async.errors import DependencyError, V2VError
from v2v_async.process import start_time

BINDING = """\
class GuestFS:
    def __init__(self, **flags): pass
    def add_drive_scratch(self, size): pass
    def launch(self):
        {launch}
    def shutdown(self): pass
"""


def launch(folder: Path, code: str, *, timeout_s: float = 60) -> float:
    (folder / "guestfs.py").write_text(BINDING.format(launch=code))
    environment = {"PYTHONPATH": str(folder), "MARK": "given"}
    return anyio.run(partial(appliance.try_launch, environment, timeout_s=timeout_s))


def test_starts_with_the_environment(tmp_path: Path) -> None:
    code = "import os; assert os.environ['MARK'] == 'given'"
    assert launch(tmp_path, code) > 0


def test_failure_has_the_reason(tmp_path: Path) -> None:
    with pytest.raises(V2VError, match="supermin exited with error") as caught:
        launch(tmp_path, "raise RuntimeError('supermin exited with error')")
    assert caught.value.hint is not None


def test_crash(tmp_path: Path) -> None:
    with pytest.raises(V2VError, match="SIGABRT"):
        launch(tmp_path, "import os; os.abort()")


def test_hang_is_ended(tmp_path: Path) -> None:
    code = (
        "import os, time; "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    began = time.monotonic()
    with pytest.raises(V2VError, match="did not start within"):
        launch(tmp_path, code, timeout_s=3)
    assert time.monotonic() - began < 60
    assert start_time(int((tmp_path / "pid").read_text())) is None


def test_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "guestfs":
            raise ImportError("No module named 'guestfs'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match="libguestfs"):
        appliance.version()
