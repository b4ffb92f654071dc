"""Help screens and shell completion, both from argparse parsers that never parse."""

from __future__ import annotations

import argparse
from typing import Any, ClassVar, Literal

import shtab
from rich_argparse import RichHelpFormatter

_FILES = {"file": shtab.FILE, "directory": shtab.DIRECTORY}


class HelpFormatter(RichHelpFormatter):
    """Rich help whose texts are plain: square brackets mean themselves here."""

    help_markup: ClassVar[bool] = False
    text_markup: ClassVar[bool] = False

    def __init__(self, prog: str, **kwargs: Any) -> None:
        kwargs.setdefault("max_help_position", 26)
        super().__init__(prog, **kwargs)


def completed_by(action: argparse.Action, files: Literal["file", "directory"] | None) -> None:
    """Let the shell complete the argument of ``action`` with files or directories."""
    if files is not None:
        action.complete = _FILES[files]  # type: ignore[attr-defined]


def completion(parser: argparse.ArgumentParser, shell: Literal["bash", "zsh"]) -> str:
    """Return the completion script of ``parser`` for ``shell``."""
    return shtab.complete(parser, shell=shell)
