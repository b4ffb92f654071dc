"""The command line is taken apart as getopt_long_only does; expectations come from virt-v2v 2.2."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.cli import table
from v2v_async.cli.getopt import Given, parse
from v2v_async.errors import UsageError


def taken(*argv: str) -> list[tuple[str, str | None]]:
    return [
        (item.option.name, item.value) if isinstance(item, Given) else ("word", item.text)
        for item in parse(table.OPTIONS, argv)
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-os", "d"], [("-os", "d")]),
        (["-os=d"], [("-os", "d")]),
        (["--os", "d"], [("-os", "d")]),
        (["--os=d=e"], [("-os", "d=e")]),
        (["-o", "null"], [("-o", "null")]),
        (["-onull"], [("-o", "null")]),
        (["-idisk"], [("-i", "disk")]),
        (["-vx"], [("-v", None), ("-x", None)]),
        (["-xn", "a:b"], [("-x", None), ("-n", "a:b")]),
        (["-xna:b"], [("-x", None), ("-n", "a:b")]),
        (["-bridge", "x"], [("-b", "x")]),
        (["--net", "x"], [("-n", "x")]),
        (["--vers"], [("-V", None)]),
        (["-h"], [("--help", None)]),
        (["--mach"], [("--machine-readable", None)]),
        (["--machine-readable=fd:3"], [("--machine-readable", "fd:3")]),
        (["--machine-readable", "a"], [("--machine-readable", None), ("word", "a")]),
        (["--root", "-V"], [("--root", "-V")]),
        (["a", "-v", "b"], [("word", "a"), ("-v", None), ("word", "b")]),
        (["-v", "--", "-v"], [("-v", None), ("word", "-v")]),
        (["-"], [("word", "-")]),
        ([""], [("word", "")]),
        (["-colors"], [("--colours", None)]),
        (["-n", "a", "-n", "b"], [("-n", "a"), ("-n", "b")]),
        (["--memsize", "1", "-m", "2"], [("--memsize", "1"), ("--memsize", "2")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_accepted(argv: list[str], expected: list[tuple[str, str | None]]) -> None:
    assert taken(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus"], "unknown option ‘--bogus’"),
        (["-Z"], "unknown option ‘-Z’"),
        (["-vZ"], "unknown option ‘-Z’"),
        (["-os"], "needs an argument"),
        (["-o"], "needs an argument"),
        (["--i", "disk"], "ambiguous"),
        (["-o=null"], "ambiguous"),
        (["-ver"], "ambiguous"),
        (["--col"], "ambiguous"),
        (["--vddk-co", "x"], "ambiguous"),
        (["--quiet=yes"], "takes no argument"),
        (["-of", "raw", "--of=raw"], "-of was given more than once"),
        (["-i", "disk", "-ilocal"], "-i was given more than once"),
        (["-o", "null", "-onull"], "-o was given more than once"),
        (["--bandwidth", "1", "--bandwidth", "2"], "more than once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        taken(*argv)
    assert caught.value.exit_status == 2
    assert caught.value.hint


def test_an_error_is_raised_only_when_reached() -> None:
    items = parse(table.OPTIONS, ["--help", "--bogus"])
    first = next(items)
    assert isinstance(first, Given)
    assert first.option.name == "--help"


@pytest.mark.parametrize("argv", [["--kye=all:key:SECRET"], ["--i=all:key:SECRET"]])
def test_arguments_of_unknown_options_are_not_quoted(argv: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        taken(*argv)
    assert "SECRET" not in f"{caught.value} {caught.value.hint}"


def test_every_long_name_is_one_option_only() -> None:
    names = [name for option in table.OPTIONS for name in option.names]
    assert len(names) == len(set(names))


@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_words_parse_or_are_refused(argv: list[str]) -> None:
    with suppress(UsageError):
        taken(*argv)
