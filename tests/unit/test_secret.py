"""A password is shown to nobody but who reveals it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from v2v_async.errors import UsageError
from v2v_async.options import InputOptions
from v2v_async.secret import Secret, secret_file


def test_it_is_not_shown() -> None:
    secret = Secret("hunter2")
    options = InputOptions("libvirt", ("x",), password=secret)
    for shown in (repr(secret), str(secret), f"{secret}", repr(options), str(options)):
        assert "hunter2" not in shown
    assert secret.reveal() == "hunter2"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"pass word", "pass word"), (b"x\n", "x"), (b"x\r\n", "x"), ("pä$'\"".encode(), "pä$'\"")],
)
def test_a_password_file(tmp_path: Path, content: bytes, password: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    assert Secret.read(path, "-ip").reveal() == password


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"a\0b", b"\xff\xfe", b"x" * 70000])
def test_what_is_no_password_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="-ip"):
        Secret.read(path, "-ip")


def test_a_password_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        Secret.read(tmp_path / "no", "-ip")
    with pytest.raises(UsageError, match="Is a directory"):
        Secret.read(tmp_path, "-ip")


def test_the_file_for_a_server_goes_away(tmp_path: Path) -> None:
    with secret_file(tmp_path, Secret("hunter2")) as path:
        assert path.read_text() == "hunter2\n"
        assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced_and_a_link_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".secret").symlink_to(elsewhere)
    with secret_file(folder, Secret("hunter2")) as path:
        assert not path.is_symlink()
        assert path.read_text() == "hunter2\n"
        assert path.stat().st_mode & 0o777 == 0o600
    assert elsewhere.read_text() == "precious"
    assert list(folder.iterdir()) == []
