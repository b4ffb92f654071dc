"""Which filters a disk is read through, and in what order."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.input.image import NEVER, NbdImage, PluginImage, Retry
from v2v_async.input.overlay import source_command
from v2v_async.nbdkit import Features

TWICE: Retry = {"retry": ("retries=1",), "retry-request": ("retry-request-retries=2",)}


def features(folder: Path, *filters: str) -> Features:
    """Return what an nbdkit has that is nothing but names of files."""
    for name in (
        "nbdkit-curl-plugin",
        "nbdkit-nbd-plugin",
        *(f"nbdkit-{f}-filter" for f in filters),
    ):
        (folder / f"{name}.so").touch()
    return Features("nbdkit", (1, 32, 0), folder, folder)


def chain(argv: tuple[str, ...]) -> list[str]:
    return [word.removeprefix("--filter=") for word in argv if word.startswith("--filter=")]


def far(retry: Retry) -> PluginImage:
    return PluginImage("curl", ("url=x", "maxdata=1"), "x", filters=("blocksize",), retry=retry)


@pytest.mark.parametrize(
    ("there", "filters", "words"),
    [
        (
            ["retry", "retry-request"],
            ["cow", "blocksize", "retry", "retry-request"],
            ["retries=1", "retry-request-retries=2"],
        ),
        (["retry"], ["cow", "blocksize", "retry"], ["retries=1"]),
        ([], ["cow", "blocksize"], []),
    ],
)
def test_what_tries_again_stands_nearest_to_the_plugin(
    tmp_path: Path, there: list[str], filters: list[str], words: list[str]
) -> None:
    """A filter's parameters come with it only: nbdkit takes none that nobody knows."""
    has = features(tmp_path, "cow", "blocksize", *there)
    argv = source_command(has, far(TWICE), tmp_path / "s", scratch=tmp_path).argv
    assert chain(argv) == filters
    assert [word for word in argv if "retries" in word] == words
    assert argv.index("curl") < argv.index("url=x")


def test_nothing_is_tried_again_where_none_is_wanted(tmp_path: Path) -> None:
    has = features(tmp_path, "blocksize", "retry", "retry-request")
    assert chain(source_command(has, far(NEVER), tmp_path / "s").argv) == ["blocksize"]


def test_an_export_is_opened_anew(tmp_path: Path) -> None:
    """Where there is no such filter it is read all the same."""
    image = NbdImage("nbd://host/x")
    assert chain(source_command(features(tmp_path), image, tmp_path / "s").argv) == []
    argv = source_command(features(tmp_path, "retry"), image, tmp_path / "s").argv
    assert chain(argv) == ["retry"]
    assert "retries=5" in argv
