"""What goes to a worker, passwords too: as bytes that nothing can show.

dask writes the arguments of a call that failed to its logs, by ``repr``. A :class:`Sealed` has one
that says nothing, and only :meth:`Sealed.open` gives what is in it.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from v2v_async.options import GuestOptions
from v2v_async.redact import redact
from v2v_async.secret import Secret


class Sealed:
    """Any picklable thing, with the passwords in it."""

    __slots__ = ("_content",)

    def __init__(self, content: bytes) -> None:
        self._content = content

    @classmethod
    def of(cls, thing: Any) -> Sealed:
        """Seal a thing."""
        file = io.BytesIO()
        _Pickler(file).dump(thing)
        return cls(file.getvalue())

    def open(self) -> Any:
        """Return what was sealed."""
        return pickle.loads(self._content)

    def __repr__(self) -> str:
        return "Sealed(***)"

    def __reduce__(self) -> tuple[object, ...]:
        return Sealed, (self._content,)


class _Pickler(pickle.Pickler):
    """The only one that takes a Secret: no other writes one to a place where it could stay."""

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, Secret):
            return Secret, (thing.reveal(),)
        return NotImplemented


def has_secrets(options: GuestOptions) -> bool:
    """Tell whether options hold what nobody else may read."""
    given, made = options.input, options.output
    if given.password is not None or made.password is not None:
        return True
    texts = [*options.convert.keys, *options.convert.customize]
    texts += [uri for uri in (given.connection, made.connection) if uri is not None]
    texts += [f"{name}={value}" for name, value in (*given.options, *made.options)]
    return any(redact(text) != text for text in texts)
