"""The words of ``v2v-async batch``: what is refused before anything is done, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.batch.plan.file import PlanError
from v2v_async.cli.batch import plans
from v2v_async.cli.batch.main import main
from v2v_async.errors import UsageError

GUEST = (
    '[[guests]]\nname = "web"\ninput = { type = "disk", source = "a.img" }\noutput.type = "null"\n'
)


@pytest.mark.parametrize(
    "line",
    ['convert.keys = ["all:key:hunter2"]', 'options = ["--key", "/dev/sda1:key:hunter2"]'],
)
def test_a_passphrase_is_refused_and_not_told(tmp_path: Path, line: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(GUEST + line)
    with pytest.raises(PlanError, match="a passphrase .* can't stand in a plan") as caught:
        plans.read(plan)
    assert "hunter2" not in str(caught.value)
    assert "ID:file:FILE" in str(caught.value)


@pytest.mark.parametrize("key", ["all:file:/root/key", "all:clevis"])
def test_keys_without_a_passphrase(tmp_path: Path, key: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(f'{GUEST}convert.keys = ["{key}"]')
    assert plans.read(plan)[1]["web"].convert.keys == (key,)


def test_all_unknown_guests_are_named() -> None:
    with pytest.raises(UsageError, match="no guest ‘wep’, ‘x’") as caught:
        plans.named_guests(["web", "db"], ["wep", "db", "x", "wep"], "r")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean ‘web’? ")
    assert plans.named_guests(["web", "db"], ["db", "db"], "r") == ["db"]
    assert plans.named_guests(["web", "db"], [], "r") == ["web", "db"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x.json"], "a plan is TOML or YAML"),
        (["--yaml", "x.toml"], "would be read as TOML"),
        (["--yaml", "x"], "would be read as TOML"),
    ],
)
def test_a_plan_is_named_after_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=told):
        main(["init", *words])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--yaml", "x.yml"], ["x.yaml"]])
def test_a_plan_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words]) == 0
    assert "\nguests:" in (tmp_path / words[-1]).read_text()


def test_resume_says_that_others_go_on_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["resume", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert "of a stopped run, all others that are not paused go on too" in help_text
