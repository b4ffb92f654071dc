"""A terminal as far as the live screens use one: what a person would see of what was written."""

from __future__ import annotations

import io
import re

from rich.console import Console

_PIECE = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class SmallTerminal:
    """``history`` has the lines that scrolled away, ``rows`` those that are seen."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.history: list[str] = []
        self.rows = [""] * height
        self.row = self.column = 0
        self.is_cursor_seen = True

    def write(self, text: str) -> None:
        """Take in what a program writes; a sequence that is not known is an error."""
        at = 0
        while at < len(text):
            piece = _PIECE.match(text, at)
            assert piece is not None, repr(text[at : at + 20])
            at = piece.end()
            numbers, final, control, written = piece.groups()
            if written is not None:
                self._put(written)
            elif control == "\r":
                self.column = 0
            elif control == "\n":  # the terminal's driver adds the \r
                self._down()
            else:
                self._sequence(numbers, final)

    @property
    def shown(self) -> list[str]:
        """Return all lines, without the empty ones at the end."""
        lines = [line.rstrip() for line in [*self.history, *self.rows]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def _put(self, text: str) -> None:
        line = self.rows[self.row].ljust(self.column)
        after = self.column + len(text)
        assert after < self.width, "the last column is written to, or more"
        self.rows[self.row] = line[: self.column] + text + line[after:]
        self.column = after

    def _down(self) -> None:
        self.column = 0
        self.row += 1
        if self.row == self.height:
            self.row -= 1
            self.history.append(self.rows.pop(0))
            self.rows.append("")

    def _sequence(self, numbers: str, final: str) -> None:
        if final == "A":
            self.row = max(self.row - int(numbers or 1), 0)
        elif final == "K":
            self.rows[self.row] = self.rows[self.row][: self.column]
        elif final == "J":
            self.rows[self.row] = self.rows[self.row][: self.column]
            self.rows[self.row + 1 :] = [""] * (self.height - self.row - 1)
        elif final in "hl" and numbers == "?25":
            self.is_cursor_seen = final == "h"
        else:
            assert final == "m", f"{numbers}{final}"


class Resizable(Console):
    """A console whose terminal a test reads, and may resize."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        super().__init__(
            file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None
        )
        self.terminal = SmallTerminal(width, height)

    def read(self) -> SmallTerminal:
        assert isinstance(self.file, io.StringIO)
        self.terminal.write(self.file.getvalue())
        self.file.seek(0)
        self.file.truncate()
        return self.terminal
