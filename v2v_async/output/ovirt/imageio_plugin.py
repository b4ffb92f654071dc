"""An nbdkit plugin (``nbdkit python``): the disk of an image transfer as an NBD export.

Its one parameter is ``transfer=FILE``: JSON, mode 0600, with ``url``, ``size`` (bytes), ``verify``,
``ca_file`` and ``is_local``. The URL lets anybody write to the disk, so the file is removed as soon
as it is read, and nothing of it is ever printed.

nbdkit has a Python of its own, so what is used here is found beside this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import nbdkit

if TYPE_CHECKING:
    from v2v_async.output.ovirt.imageio import Images

API_VERSION = 2

# Python takes ``__file__`` away from a script as soon as it has run.
_HERE = os.path.dirname(os.path.abspath(__file__))

# What abandon looks for in the log, to say why a copy failed.
MARK = "v2v-imageio: "

_size = 0
_images: Images | None = None
_transfer: dict[str, Any] = {}


def _imageio() -> Any:
    path = os.path.join(_HERE, "imageio.py")
    spec = importlib.util.spec_from_file_location("v2v_imageio", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def thread_model() -> int:
    """Serve requests in parallel, on as many connections as the server allows."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """Read the file with the transfer, and remove it."""
    global _transfer
    if key != "transfer":
        raise RuntimeError(f"there is no parameter {key}")
    with open_file(value) as file:
        _transfer = json.load(file)
    os.unlink(value)


def config_complete() -> None:
    """Check that there is a transfer."""
    global _size
    if not _transfer:
        raise RuntimeError("transfer=FILE is missing")
    _size = int(_transfer["size"])


def after_fork() -> None:
    """Reach the server. Not before: threads do not survive a fork."""
    global _images
    images = _imageio().Images(
        _transfer["url"],
        verify=bool(_transfer["verify"]),
        ca_file=_transfer["ca_file"],
        is_local=bool(_transfer["is_local"]),
    )
    try:
        images.open()
    except OSError as error:
        raise RuntimeError(f"{MARK}{error.strerror}") from None
    _images = images


def cleanup() -> None:
    """Close the connections."""
    if _images is not None:
        _images.close()


open_file = open


def open(readonly: bool) -> int:
    """Have no state for a client: all share the connections."""
    return 1


def get_size(h: int) -> int:
    """Return the size in bytes."""
    return _size


def can_trim(h: int) -> bool:
    """There is no such request."""
    return False


def can_zero(h: int) -> bool:
    """Return whether zeroes need not be sent."""
    return _images is not None and bool(_images.can_zero)


def can_flush(h: int) -> bool:
    """Return whether the server can flush."""
    return _images is not None and bool(_images.can_flush)


def can_fua(h: int) -> int:
    """Return how a write is flushed by itself."""
    return int(nbdkit.FUA_NATIVE if can_flush(h) else nbdkit.FUA_NONE)


def can_multi_conn(h: int) -> bool:
    """A flush is of everything."""
    return True


def pread(h: int, buf: Any, offset: int, flags: int) -> None:
    """Read."""
    assert _images is not None
    try:
        _images.read(memoryview(buf), offset)
    except OSError as error:
        _fail(error)


def pwrite(h: int, buf: Any, offset: int, flags: int) -> None:
    """Write."""
    assert _images is not None
    try:
        _images.write(buf, offset, flush=bool(flags & nbdkit.FLAG_FUA))
    except OSError as error:
        _fail(error)


def zero(h: int, count: int, offset: int, flags: int) -> None:
    """Make zero. Whether room is taken for that, the disk's allocation policy decides."""
    assert _images is not None
    try:
        _images.zero(offset, count, flush=bool(flags & nbdkit.FLAG_FUA))
    except OSError as error:
        _fail(error)


def flush(h: int, flags: int) -> None:
    """Have everything on the disk."""
    assert _images is not None
    try:
        _images.flush()
    except OSError as error:
        _fail(error)


def _fail(error: OSError) -> None:
    """Let nbdkit fail the request. ``from None``: a traceback would only fill the log."""
    nbdkit.set_error(error.errno or 5)
    print(f"{MARK}{error.strerror}", file=sys.stderr, flush=True)
    raise RuntimeError(f"{MARK}{error.strerror}") from None
