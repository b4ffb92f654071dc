"""Facts that are slow to find out, remembered in the cache folder.

A fact is one small JSON file named after everything that it depends on. Losing one costs time and
nothing else, so nothing here ever raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_dir() -> Path | None:
    """Return the cache folder, which may not exist yet; None when there is no home for it.

    ``$V2V_ASYNC_CACHE``, else ``$XDG_CACHE_HOME/v2v-async``, else ``~/.cache/v2v-async``.
    """
    chosen = os.environ.get("V2V_ASYNC_CACHE")
    if chosen:
        return Path(chosen)
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # XDG: a relative path is to be ignored; so is a ~ that could not be expanded.
    return base / "v2v-async" if base.is_absolute() else None


def recall(folder: Path | None, name: str, key: object) -> dict[str, Any] | None:
    """Return what was remembered as ``name`` under exactly this ``key`` (JSON), else None."""
    if folder is None:
        return None
    try:
        document = json.loads(path_of(folder, name, key).read_text())
    except (OSError, ValueError):
        return None
    fact = document.get("fact") if isinstance(document, dict) else None
    return fact if isinstance(fact, dict) else None


def remember(folder: Path | None, name: str, key: object, fact: dict[str, Any]) -> None:
    """Remember ``fact`` (JSON) as ``name`` under ``key``, where that can be written."""
    if folder is None:
        return
    text = json.dumps({"key": key, "fact": fact}, indent=1, sort_keys=True)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed into place: several runs may find the same thing out at the same time.
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "w") as stream:
                stream.write(text)
            os.replace(temporary, path_of(folder, name, key))
        except OSError:
            os.unlink(temporary)
            raise


def file_identity(path: str | Path) -> list[str | int]:
    """Return what tells this version of a file from another one, for a key."""
    try:
        status = os.stat(path)
    except OSError:
        return [str(path), 0, 0]
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]


def path_of(folder: Path, name: str, key: object) -> Path:
    """Return where what depends on ``key`` (JSON) is kept as ``name``."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{name}-{digest}.json"
