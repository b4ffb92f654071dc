"""The commands in the documentation parse, each one, and so do its source and its target."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from v2v_async.cli import modes, virt_v2v
from v2v_async.input.registry import parse_input
from v2v_async.output.registry import parse_output

_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?virt-v2v-async (.*)$", re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """Yield the file's name and the arguments of each command that stands in a block of code."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in _BLOCK.findall(path.read_text()):
            for words in _COMMAND.findall(block.replace("\\\n", " ")):
                yield path.name, words


FOUND = list(commands())


def test_there_are_some_for_each_target() -> None:
    shown = " ".join(words for _, words in FOUND)
    for name in modes.OUTPUTS:
        assert f"-o {name}" in shown


@pytest.mark.parametrize(("name", "words"), FOUND, ids=[f"{n}: {w[:60]}" for n, w in FOUND])
def test_it_parses(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OS_AUTH_URL", "http://127.0.0.1:1")
    argv = [word for word in shlex.split(words, comments=True) if word != "…"]
    for option in ("-ip", "-op"):
        if option in argv:
            (tmp_path / argv[argv.index(option) + 1]).write_text("secret\n")
    for option in ("rhv-cafile", "ssh-known-hosts", "ssh-identity"):
        for word in argv:
            if word.startswith(f"{option}="):
                (tmp_path / word.partition("=")[2]).write_text("")
    options = virt_v2v.guest_options(virt_v2v.read(argv))
    parse_input(options.input)
    if "--print-source" not in argv:
        parse_output(options.output)
