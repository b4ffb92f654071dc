"""Errors of a worker as the supervisor gets them: the same class, the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from v2v_async import errors
from v2v_async.errors import V2VError


def error_to_send(error: V2VError) -> dict[str, Any]:
    """Return an error as something that JSON has words for."""
    fields = {name: value for name, value in vars(error).items() if _is_plain(value)}
    fields["log"] = None if error.log is None else str(error.log)
    # What caused it stays behind, but for the number that tells whether trying again is any use.
    fields["errno"] = _errno(error)
    return {"kind": type(error).__name__, "fields": fields}


def error_sent(told: dict[str, Any]) -> V2VError:
    """Return the error that :func:`error_to_send` was given."""
    kind = getattr(errors, told["kind"], V2VError)
    if not (isinstance(kind, type) and issubclass(kind, V2VError)):
        kind = V2VError
    fields = dict(told["fields"])
    log = fields.pop("log")
    error = kind.__new__(kind)
    V2VError.__init__(error, fields.pop("message"), log=Path(log) if log else None)
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _errno(error: BaseException) -> int:
    """Return the first errno that an error or one of its causes has; 0: none has one."""
    cause: BaseException | None = error
    while cause is not None:
        code = getattr(cause, "errno", None)
        if isinstance(code, int) and code:
            return code
        cause = cause.__cause__
    return 0
