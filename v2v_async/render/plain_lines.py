"""What plain renderers share: where lines go, the time before each, and warnings apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Self

from v2v_async.render.text import clean_lines


@dataclass(eq=False)
class PlainLines:
    """Writes through ``write``; warnings through ``write_warning`` (stderr, as virt-v2v)."""

    name = "screen"
    codes: ClassVar[Mapping[str, str]]
    """The colours, by the types of events."""

    write: Callable[[str], object]
    write_warning: Callable[[str], object] | None = None
    _: KW_ONLY
    prog: str = "v2v-async"
    quiet: bool = False
    verbose: bool = False
    colours: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The streams belong to the edge."""

    def say(self, elapsed_s: float, type_: str, text: str, more: Iterable[str] = ()) -> None:
        """Write ``text``, coloured as events of that type are, and ``more`` below it."""
        prefix = f"[{elapsed_s:6.1f}] "
        first, *rest = clean_lines(text)
        self.write(self._coloured(type_, prefix + first) + "\n")
        for line in [*rest, *(line for each in more for line in clean_lines(each))]:
            self.write(" " * len(prefix) + line + "\n")

    def warn(self, text: str) -> None:
        """Write a warning."""
        write = self.write_warning or self.write
        first, *rest = clean_lines(text)
        write(self._coloured("warning", f"{self.prog}: warning: {first}") + "\n")
        for line in rest:
            write("  " + line + "\n")

    def _coloured(self, type_: str, text: str) -> str:
        code = self.codes.get(type_)
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and code else text
