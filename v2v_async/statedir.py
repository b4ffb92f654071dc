"""Where work is kept that must outlive its program, and a reboot."""

from __future__ import annotations

import os
from pathlib import Path

from v2v_async.errors import UsageError


def state_dir(kind: str) -> Path:
    """Return the folder for one kind of work, which may not exist yet.

    Below ``$V2V_ASYNC_STATE``, ``$XDG_STATE_HOME/v2v-async`` or ``~/.local/state/v2v-async``.

    Raises:
        UsageError: there is no home for it.
    """
    if chosen := os.environ.get("V2V_ASYNC_STATE"):
        return Path(chosen).absolute() / kind
    base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    if not base.is_absolute():
        raise UsageError(
            "there is no place to keep the run: no home directory is known",
            hint="set V2V_ASYNC_STATE to a directory",
        )
    return base / "v2v-async" / kind
