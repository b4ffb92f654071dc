"""The commands in the documentation parse, each one, and so do its source and its target.

So do the plans in it, and the commands of ``v2v-async batch``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from v2v_async.batch.plan.file import read_plan
from v2v_async.batch.plan.init import init_text
from v2v_async.cli import modes, virt_v2v
from v2v_async.cli.batch import words as batch_words
from v2v_async.input.registry import parse_input
from v2v_async.output.registry import parse_output

_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?virt-v2v-async (.*)$", re.MULTILINE)


_BATCH = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?v2v-async batch (.*)$", re.MULTILINE)
_PLAN = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield the file's name and the arguments of each command that stands in a block of code."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in _BLOCK.findall(path.read_text()):
            for words in pattern.findall(block.replace("\\\n", " ")):
                yield path.name, words


FOUND = list(commands(_COMMAND))
FOUND_BATCH = list(commands(_BATCH))


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


# Batches.


def parsed(words: str) -> str:
    """Return which command of ``v2v-async batch`` the words are; they are wrong: SystemExit."""
    argv = [word for word in shlex.split(words, comments=True) if word != "…"]
    command: str = batch_words.parser().parse_args(argv).command
    return command


@pytest.mark.parametrize(
    ("name", "words"), FOUND_BATCH, ids=[f"{n}: {w[:60]}" for n, w in FOUND_BATCH]
)
def test_a_command_of_batch_parses(name: str, words: str) -> None:
    assert parsed(words)


def test_every_command_of_batch_is_shown() -> None:
    shown = {parsed(words) for name, words in FOUND_BATCH if name == "batch.md"}
    assert shown == {"init", "run", "status", "pause", "resume", "cancel", "report"}
    for syntax in ("toml", "yaml"):
        in_plan = re.findall(r"^#     v2v-async batch (.*)$", init_text(syntax, "p"), re.MULTILINE)
        assert [parsed(words) for words in in_plan] == ["run", "run"]


def test_plans_in_the_documentation_are_right(tmp_path: Path) -> None:
    plans = _PLAN.findall((ROOT / "docs" / "batch.md").read_text())
    assert plans
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "db01.xml").touch()
    (tmp_path / "guests.csv").write_text("name,group,priority\nweb01,web,5\n")
    for text in plans:
        (tmp_path / "plan.toml").write_text(text)
        plan = read_plan(tmp_path / "plan.toml")
        assert [guest.name for guest in plan.guests] == ["web01", "db01", "scratch"]
        for guest in plan.guests:
            virt_v2v.guest_options(virt_v2v.read(guest.words()))


def test_screens_of_the_batch_have_their_places() -> None:
    text = (ROOT / "docs" / "batch.md").read_text()
    places = re.findall(r"^<!-- screen: ([a-z-]+) -->$", text, re.MULTILINE)
    assert len(places) == len(set(places))
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
