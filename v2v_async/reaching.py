"""What goes wrong on the way to a server that speaks HTTPS, as a person would say it."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from v2v_async.errors import V2VError


@contextmanager
def reaching(
    what: str, host: str, *, option: str, untrusted: str, timeout_s: float, error: type[V2VError]
) -> Iterator[None]:
    """Raise ``error`` for what keeps a request from going, or its answer from coming.

    ``what`` names the server, ``option`` is where its address was given, and ``untrusted`` says
    what to do about its certificate.
    """
    try:
        yield
    except ssl.SSLCertVerificationError as problem:
        raise error(
            f"the certificate of {what} is not trusted: {problem.verify_message}", hint=untrusted
        ) from problem
    except ssl.SSLError as problem:
        raise error(
            f"{what} does not speak TLS: {problem.reason or problem}",
            hint=f"check the host and the port in {option}",
        ) from problem
    except socket.gaierror as problem:
        raise error(
            f"the host ‘{host}’ is not known: {problem.strerror}", hint=f"check {option}"
        ) from problem
    except TimeoutError as problem:
        raise error(
            f"{what} does not answer within {timeout_s:.0f} s",
            hint="is it up, and the way to it open?",
        ) from problem
    except (OSError, http.client.HTTPException) as problem:
        raise error(
            f"{what} can't be reached: {reason_of(problem)}",
            hint="is it up, and the way to it open?",
        ) from problem


def reason_of(error: Exception) -> str:
    """Return the shortest words there are for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
