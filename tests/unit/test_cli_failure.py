"""Errors are told in one form, with everything that is known and no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.cli.failure import explain
from v2v_async.errors import (
    ConversionError,
    CopyError,
    RequestError,
    ServerStartError,
    UsageError,
    V2VError,
)


def failed_copy() -> CopyError:
    try:
        try:
            raise RequestError("write", offset=65536, length=4096, reason="No space left on device")
        except RequestError as cause:
            raise CopyError(
                "the disk could not be copied",
                guest="g",
                step="copy",
                disk=2,
                offset=65536,
                log=Path("/v/log/copy-2.log"),
                hint="free space, then run it again",
            ) from cause
    except CopyError as error:
        return error


def test_the_form() -> None:
    assert explain(failed_copy()).text("v2v-async") == (
        "v2v-async: error: the disk could not be copied\n"
        "  where: guest g, step copy, disk 2, offset 65536\n"
        "  cause: write of 4096 bytes failed: No space left on device\n"
        "  log:   /v/log/copy-2.log\n"
        "  hint:  free space, then run it again\n"
    )
    assert explain(failed_copy()).exit_status == 1
    assert explain(UsageError("x")).exit_status == 2


def test_a_group_tells_the_purposeful_error_and_names_the_others() -> None:
    group = ExceptionGroup("g", [ValueError("odd"), ExceptionGroup("h", [failed_copy()])])
    text = explain(group).text("p")
    assert text.startswith("p: error: the disk could not be copied\n")
    assert "  also:  ValueError: odd\n" in text
    assert "this is a bug" in text


def test_an_unexpected_error_is_called_a_bug_and_traced_only_when_asked() -> None:
    with pytest.raises(KeyError) as caught:
        raise KeyError("x")
    error = caught.value
    assert "Traceback" not in explain(error).text("p")
    assert "Traceback" in explain(error, verbose=True).text("p")
    assert "bug" in explain(error).text("p")
    assert explain(error).exit_status == 1


def test_a_servers_last_words_and_a_conversions_phase() -> None:
    tail = "\n".join(f"line {n}" for n in range(20))
    error = ServerStartError("nbdkit did not start", argv=["nbdkit", "x"], stderr_tail=tail)
    text = explain(error).text("p")
    assert "line 19" in text
    assert "line 5\n" not in text
    assert "while: Inspecting" in explain(ConversionError("no", phase="Inspecting")).text("p")


@pytest.mark.parametrize(
    "text", ["nbd://u:SECRET@h/x", "x password=SECRET", "--key all:key:SECRET"]
)
def test_secrets_are_masked(text: str) -> None:
    error = V2VError(text, hint=text)
    error.__cause__ = OSError(text)
    failure = explain(error, verbose=True)
    assert "SECRET" not in failure.text("p") + failure.one_line() + str(failure.hint)


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    text = explain(V2VError("a\x1b]0;owned\x07b\rc\nd", guest="\x1b[2J")).text("p")
    assert not any(c in text for c in "\x1b\x07\r")
    assert "\n  d\n" in text
