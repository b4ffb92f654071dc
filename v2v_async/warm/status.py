"""What ``warm status`` tells of a migration, as ``--json`` prints it."""

from __future__ import annotations

import time

from v2v_async.warm.forecast import Forecast, forecast
from v2v_async.warm.state import WarmFolder, WarmState


class WarmStatus(WarmState):
    """What is known, and what follows from it.

    ``is_busy``: whether a command is at it. ``forecast``: what a cutover now would cost; None where
    that can't be told yet.
    """

    is_busy: bool
    forecast: Forecast | None


def look(folder: WarmFolder) -> WarmStatus:
    """Return how far the migration in a folder is.

    Raises:
        UsageError: there is none in it.
        V2VError: it can't be read.
    """
    state = folder.read()
    found = forecast(state.passes, time.time())
    return WarmStatus(**dict(state), is_busy=folder.is_busy, forecast=found)
