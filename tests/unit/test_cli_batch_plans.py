"""A plan and its guests' options: as many mistakes as can be known are told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from v2v_async.batch.plan.file import PlanError
from v2v_async.cli.batch import plans


def mistakes(folder: Path, text: str) -> list[str]:
    path = folder / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        plans.read(path)
    return caught.value.mistakes


def cut(mistake: str) -> str:
    """Return a mistake without its hint."""
    return mistake.partition(" (")[0]


def test_the_options_of_malformed_guests_are_checked_as_far_as_they_are_known(
    tmp_path: Path,
) -> None:
    found = mistakes(
        tmp_path,
        """limits.disks = 0
[[guests]]
name = "output"
input = { type = "disk", source = "a.img", options = { speed = "9" } }
output.storage = 3
[[guests]]
name = "input"
input.sorce = "a.img"
output = { type = "local" }
[[guests]]
name = "priority"
prioritty = 3
input = { type = "disk", source = "a.img" }
output = { type = "tape" }
[[guests]]
input = { type = "disk" }
output = { type = "null" }
[[guests]]
name = "all"
input = { type = "vmx", source = "a.vmx", password_file = "absent" }
output = { type = "local", storage = "/srv", format = "raw", options = { compressed = true } }
convert.root = "second"
""",
    )
    assert [cut(each) for each in found] == [
        "plan.toml:1: limits.disks: must be at least 1",
        "plan.toml:2: output: -i disk takes no -io speed",
        "plan.toml:5: guests.output.storage: must be a text: write it in quotes",
        "plan.toml:6: input: -o local: no directory was named",
        "plan.toml:8: guests.input.sorce: there is no such setting",
        "plan.toml:10: priority: -o: unknown mode ‘tape’",
        "plan.toml:12: guests.prioritty: there is no such setting",
        "plan.toml:15: -i disk: no disk was named",
        "plan.toml:15: guests.name: is missing",
        "plan.toml:18: all: --root: ‘second’ is no choice",
        "plan.toml:18: all: -ip ‘absent’: No such file or directory",
        "plan.toml:18: all: -oo compressed needs -of qcow2",
    ]


def test_what_defaults_are_wrong_is_not_told_again_for_each_guest(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """[defaults]
input.type = "disk"
output = { type = "local", storage = 3 }
[[guests]]
name = "a"
[[guests]]
name = "b"
input.source = "b.img"
""",
    )
    assert [cut(each) for each in found] == [
        "plan.toml:3: output.storage: must be a text: write it in quotes",
        "plan.toml:4: a: -i disk: no disk was named",
    ]


def test_misspelt_defaults_hide_what_guests_lack(tmp_path: Path) -> None:
    text = '[default]\ninput.type = "disk"\n[[guests]]\nname = "a"\n'
    assert mistakes(tmp_path, text) == ["plan.toml:1: default: did you mean ‘defaults’?"]


@pytest.mark.parametrize(
    "line", ["sauce = 3", "options = 3", 'inputt = "a.img"'], ids=["unlike", "options", "like"]
)
def test_where_nothing_is_known_nothing_is_guessed(tmp_path: Path, line: str) -> None:
    found = mistakes(tmp_path, f'[[guests]]\nname = "a"\noutput.type = "null"\n{line}\n')
    assert len(found) == 1


def test_rows_with_the_same_mistake_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "name,priority,type\n" + "".join(f"g{n},{'x' if n > 8 else n},null\n" for n in range(1, 11))
    )
    text = (
        '[[guests]]\ncsv = "rows.csv"\npriority = "{priority}"\n'
        'output = { type = "{type}", options = { x = true } }\ninput.source = "{name}"\n'
    )
    assert [cut(each) for each in mistakes(tmp_path, text)] == [
        "plan.toml:1: g1, g2, g3 and 7 more: -o null takes no -oo x",
        "plan.toml:3: g9, g10: guests.priority: must be a whole number",
    ]
