"""The fixtures ``session_cloud`` and ``cloud``, for modules to import."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.conftest import IS_CI
from tests.services import openstack
from tests.services.openstack import TestCloud

MARKS = [
    pytest.mark.anyio,
    # openstacksdk 4.22 deprecates a part of itself that it always loads.
    pytest.mark.filterwarnings("ignore:Support for InfluxDB"),
]
"""Of every test that talks to the cloud in its own process."""

_running: list[TestCloud] = []


@pytest.fixture(scope="session")
def session_cloud(request: pytest.FixtureRequest) -> TestCloud:
    """One cloud for all modules of this worker: it takes seconds to begin."""
    if not _running:
        try:
            _running.append(openstack.start())
        except (OSError, subprocess.CalledProcessError) as error:
            if IS_CI:
                raise
            pytest.skip(f"scripts/services: {error}")
        request.config.add_cleanup(lambda: _running.pop().stop())
    return _running[0]


@pytest.fixture
def cloud(session_cloud: TestCloud, monkeypatch: pytest.MonkeyPatch) -> TestCloud:
    """An empty cloud; the environment says how to log in to it, but for the password."""
    session_cloud.reset()
    for name in list(os.environ):
        if name.startswith("OS_"):
            monkeypatch.delenv(name)
    for name, value in session_cloud.environment.items():
        monkeypatch.setenv(name, value)
    # Nobody's clouds.yaml.
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(session_cloud.folder / "clouds.yaml"))
    return session_cloud
