"""What a worker process of ``--cluster local:N`` does first (dask's ``--preload``)."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

from v2v_async.batch.cluster.launching import LOG_VARIABLE


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the supervisor, which ends us in order, and the terminal to its screen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = os.environ.get(LOG_VARIABLE)
    if folder is None:
        return
    descriptor = os.open(
        Path(folder) / f"worker-{worker.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
    )
    try:
        for standard in (1, 2):
            os.dup2(descriptor, standard)
    finally:
        os.close(descriptor)
    logging.getLogger("distributed").setLevel(logging.INFO)
