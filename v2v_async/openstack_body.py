"""A file as the body of an HTTP request: streamed, counted, digested, and stopped when told."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20


class Body:
    """A file's content for requests: it has a length and is read in chunks, from its start.

    Source: requests, prepare_body: what can be iterated and has a length is sent as it is.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._size = file.stat().st_size
        self.sent = 0
        self.digest = hashlib.sha512()
        self.is_stopped = threading.Event()

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        # Begun again where a token has expired.
        self.sent = 0
        self.digest = hashlib.sha512()
        with self._file.open("rb") as file:
            while chunk := file.read(_CHUNK):
                if self.is_stopped.is_set():
                    raise OSError("stopped")
                yield chunk
                self.digest.update(chunk)
                self.sent += len(chunk)
