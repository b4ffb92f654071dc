"""What scripts/setup installs is what the program needs; hashes for all, hosts for none."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from v2v_async import needs

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
SETUP = (ROOT / "scripts/setup").read_text()


def test_lock_has_every_dependency_with_hashes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], "setuptools"]
    locked = {match[1] for match in re.finditer(r"^([a-z0-9-]+)==", LOCK, re.MULTILINE)}
    assert {re.split(r"[><=~!\[ ;]", name)[0].lower() for name in wanted} <= locked
    for entry in re.split(r"^(?=[a-z0-9-]+==)", LOCK, flags=re.MULTILINE):
        assert "==" not in entry or "--hash=sha256:" in entry


@pytest.mark.parametrize("name", ["requirements.lock", "scripts/setup", "scripts/on-debian"])
def test_no_host_is_named(name: str) -> None:
    assert "://" not in (ROOT / name).read_text()


@pytest.mark.parametrize("manager", ["apt", "dnf"])
def test_setup_installs_what_doctor_looks_for(manager: str) -> None:
    packages = [
        *(program.package for program in needs.PROGRAMS),
        *(binding.package for binding in needs.BINDINGS),
        *(package for is_needed, _, package in needs.PLUGINS.values() if is_needed),
        needs.FILTER_PACKAGE,
    ]
    names = {str(getattr(package, manager)) for package in packages}
    block = "".join(re.findall(rf"{manager}_packages\+?=\((.*?)\)", SETUP, re.DOTALL))
    assert names <= set(block.split())
