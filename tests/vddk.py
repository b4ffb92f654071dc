"""nbdkit with a stand-in for its vddk plugin (``nbdkit-vddk-plugin``), found first in the PATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "nbdkit-vddk-plugin"

_WRAPPER = """#!{python}
import os, subprocess, sys
argv = sys.argv[1:]
if argv == ["--dump-config"]:
    told = subprocess.run([{real!r}, *argv], capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        print("plugindir=" + {plugins!r} if line.startswith("plugindir=") else line)
    sys.exit()
if "vddk" in argv:
    place = argv.index("vddk")
    argv[place : place + 1] = ["python", {script!r}]
os.execv({real!r}, ["nbdkit", *argv])
"""


@dataclass
class Vddk:
    """An installation. ``environment`` is for whatever shall use it."""

    folder: Path
    environment: dict[str, str]

    @property
    def libdir(self) -> Path:
        """VMware's library, as far as anybody looks at it."""
        return self.folder / "vmware-vix-disklib-distrib"

    @property
    def fault(self) -> Path:
        """While this file is there, reading fails."""
        return self.folder / "fault"

    def expect(self, **wanted: Any) -> None:
        """Say what the server accepts (see the script)."""
        wanted |= {"log": str(self.folder / "calls"), "fault": str(self.fault)}
        (self.folder / "expected.json").write_text(json.dumps(wanted))

    def calls(self, kind: str) -> list[str]:
        """The calls of a kind: what was noted behind the word."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split()[0] == kind]


def install(folder: Path) -> Vddk:
    """Make an installation in ``folder``."""
    real = shutil.which("nbdkit")
    assert real is not None
    told = subprocess.run([real, "--dump-config"], capture_output=True, text=True, check=True)
    config = dict(line.split("=", 1) for line in told.stdout.splitlines())
    programs, plugins = folder / "bin", folder / "plugins"
    programs.mkdir(parents=True)
    plugins.mkdir()
    for plugin in Path(config["plugindir"]).iterdir():
        (plugins / plugin.name).symlink_to(plugin)
    (plugins / "nbdkit-vddk-plugin").symlink_to(SCRIPT)
    wrapper = programs / "nbdkit"
    wrapper.write_text(
        _WRAPPER.format(python=sys.executable, real=real, plugins=str(plugins), script=str(SCRIPT))
    )
    wrapper.chmod(0o755)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VDDK_STAND_IN": str(folder / "expected.json"),
    }
    made = Vddk(folder, environment)
    library = made.libdir / "lib64"
    library.mkdir(parents=True)
    (library / "libvixDiskLib.so.8").touch()
    return made
