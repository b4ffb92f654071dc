"""``v2v-async shim DIR``: a folder for the PATH in which nbdcopy is ours."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import v2v_async
from v2v_async.errors import TargetError, UsageError

_MADE_BY = "# Made by ‘v2v-async shim’: nbdcopy by the engine of v2v-async."
_HELP = """\
Usage: v2v-async shim DIR

Make DIR/nbdcopy, which is v2v-async's copy engine behind nbdcopy's command line, and print the
line that puts DIR first in the PATH. A virt-v2v that finds it there copies with it:

  eval "$(v2v-async shim ~/.local/lib/v2v-async)"
  virt-v2v …

A file DIR/nbdcopy that was not made by this command is never replaced. To undo it, remove DIR.
"""


def main(argv: Sequence[str]) -> int:
    """Make the folder that ``argv`` names and say how to use it; return the exit status."""
    if "--help" in argv:
        sys.stdout.write(_HELP)
        return 0
    if len(argv) != 1 or argv[0].startswith("-") or not argv[0]:
        raise UsageError("shim: name one directory", hint="write v2v-async shim DIR")
    folder = Path(os.path.abspath(argv[0]))
    if os.pathsep in str(folder):
        raise UsageError(
            f"shim: ‘{folder}’ has a colon, which PATH can't hold", hint="name another"
        )
    make(folder)
    sys.stdout.write(f"export PATH={shlex.quote(str(folder))}:$PATH\n")
    return 0


def make(folder: Path) -> Path:
    """Make ``folder/nbdcopy``, replacing only one made here before; return it.

    Raises:
        TargetError: something else has that name, or it can't be written.
    """
    from v2v_async.nbdcopy import SHIM_MARKER

    program = folder / "nbdcopy"
    if not _is_free(program):
        raise TargetError(
            f"‘{program}’ was not made by v2v-async, so it stays", hint="name another directory"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The marker first: an nbdcopy of ours is never without it.
        (folder / SHIM_MARKER).write_text("nbdcopy in this folder is v2v-async\n")
        fresh = folder / f".nbdcopy.{os.getpid()}"
        fresh.write_text(_script())
        fresh.chmod(0o755)
        fresh.rename(program)
    except OSError as error:
        raise TargetError(
            f"{error.filename or folder}: {error.strerror}", hint="name a directory to write to"
        ) from None
    return program


def _is_free(program: Path) -> bool:
    if not os.path.lexists(program):
        return True
    if program.is_symlink() or not program.is_file():
        return False
    with program.open("rb") as script:
        return _MADE_BY.encode() in script.read(1024)


def _script() -> str:
    """Return a script that runs this installation, whatever the current folder holds."""
    package = str(Path(v2v_async.__file__).parent.parent)
    code = (
        f"import sys; sys.path.insert(0, {package!r}); "
        "from v2v_async.cli.main import nbdcopy; sys.exit(nbdcopy())"
    )
    # -P: a module in the current folder must not be taken for one of Python's.
    command = shlex.join([sys.executable, "-P", "-c", code])
    return f'#!/bin/sh\n{_MADE_BY}\nexec {command} "$@"\n'
