"""batch init: what it writes is a plan, with every setting of every table, whatever is used."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from v2v_async.batch.plan.file import read_plan
from v2v_async.batch.plan.init import Syntax, init_text, write_init
from v2v_async.batch.plan.model import GroupLimits, GuestDefaults, Plan, Window
from v2v_async.batch.plan.schema import GuestEntry, PlanFile
from v2v_async.cli import virt_v2v
from v2v_async.errors import UsageError
from v2v_async.input.registry import parse_input
from v2v_async.output.registry import parse_output

SYNTAXES: tuple[Syntax, ...] = get_args(Syntax)

_SETTING = {
    "toml": re.compile(r"#(?=[\[\w])"),
    "yaml": re.compile(r"""#(?=(  )*(- )?("[^"]*"|\w[\w-]*):( |$))"""),
}


def is_setting(syntax: str, line: str) -> bool:
    return _SETTING[syntax].match(line) is not None


def blocks(syntax: Syntax) -> Iterator[list[int]]:
    """Yield the numbers of the lines of each block of settings that are commented out."""
    block: list[int] = []
    for number, line in enumerate(init_text(syntax, "p").splitlines()):
        if is_setting(syntax, line):
            block.append(number)
        elif block and not line.startswith("# "):
            yield block
            block = []
    if block:
        yield block


def used(syntax: Syntax, wanted: set[int]) -> str:
    """Return the text with these lines' ‘#’ removed."""
    lines = init_text(syntax, "p").splitlines()
    return "".join(
        f"{line.removeprefix('#') if number in wanted else line}\n"
        for number, line in enumerate(lines)
    )


def read(folder: Path, syntax: str, text: str) -> Plan:
    for name in ("vms/one/one.vmx", "vms/two/two.vmx", "shop.ova"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    rows = "name,host,datastore,group,priority\ndb1,esx1.example.com,san1,web,10\n"
    (folder / "guests.csv").write_text(rows)
    path = folder / f"plan.{syntax}"
    path.write_text(text)
    return read_plan(path)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_it_is_a_plan_as_it_is(tmp_path: Path, syntax: Syntax) -> None:
    plan = read(tmp_path, syntax, init_text(syntax, "p"))
    assert plan == Plan.model_validate(
        {
            "name": "first-batch",
            "guests": [
                {
                    "name": "web1",
                    "input": {"type": "disk", "source": ["/vms/web1.img"]},
                    "output": {"type": "local", "storage": "/var/lib/libvirt/images"},
                }
            ],
        }
    )


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_each_block_can_be_used_alone(tmp_path: Path, syntax: Syntax) -> None:
    found = list(blocks(syntax))
    assert len(found) >= 12
    for block in found:
        before, after = init_text(syntax, "p"), used(syntax, set(block))
        assert before != after
        assert load(syntax, before) != load(syntax, after)
        read(tmp_path, syntax, after)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_all_can_be_used_together(tmp_path: Path, syntax: Syntax) -> None:
    plan = read(tmp_path, syntax, everything(syntax))
    assert [guest.name for guest in plan.guests] == [
        *("web1", "one", "two", "shop", "db1", "mail", "intranet", "ledger", "rehearsal")
    ]
    assert plan.limits.hosts["esx1.example.com"].bandwidth == 50_000_000
    assert plan.guests[4].datastore in plan.limits.datastores
    assert plan.guests[4].group in plan.limits.groups


def test_in_toml_each_setting_can_be_used_alone(tmp_path: Path) -> None:
    for block in blocks("toml"):
        lines = init_text("toml", "p").splitlines()
        if lines[block[0]].startswith("#["):
            continue  # an example: a table whose keys belong together
        for number in block:
            read(tmp_path, "toml", used("toml", {number}))


def test_in_yaml_each_setting_can_be_used_with_what_it_is_in(tmp_path: Path) -> None:
    lines = init_text("yaml", "p").splitlines()
    above: list[tuple[int, int]] = []  # depth and number
    count = 0
    for number, line in enumerate(lines):
        if line.startswith("#windows"):
            break  # a list: its first line carries the dash
        if not line:
            above = []
        if not is_setting("yaml", line) or "- " in line[:6]:
            continue
        depth = len(line[1:]) - len(line[1:].lstrip())
        above = [each for each in above if each[0] < depth]
        if line.endswith(":"):
            above.append((depth, number))
        elif lines[above[0][1] if above else number].startswith(("#defaults", "#limits")):
            read(tmp_path, "yaml", used("yaml", {number, *(each for _, each in above)}))
            count += 1
    assert count > 40


def everything(syntax: Syntax) -> str:
    lines = init_text(syntax, "p").splitlines()
    return used(syntax, {number for number, line in enumerate(lines) if is_setting(syntax, line)})


def load(syntax: str, text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads(text) if syntax == "toml" else yaml.safe_load(text)
    return loaded


def names_of(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_every_setting_is_in_it(syntax: Syntax) -> None:
    document = load(syntax, everything(syntax))
    assert set(document) == names_of(PlanFile)
    assert document["defaults"].keys() | {"name", "glob", "csv"} == names_of(GuestEntry)
    assert {key for guest in document["guests"] for key in guest} <= names_of(GuestEntry)
    assert {"glob", "csv"} <= {key for guest in document["guests"] for key in guest}
    for name, field in GuestEntry.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            key = field.alias or name
            assert set(document["defaults"][key]) == names_of(field.annotation)
    assert set(document["limits"]) == names_of(type(Plan.model_fields["limits"].default))
    for kind in ("hosts", "datastores", "targets", "groups"):
        [named] = document["limits"][kind].values()
        assert set(named) == names_of(GroupLimits)
    assert set(document["windows"][0]) == names_of(Window)
    assert set(document["retries"]) == names_of(type(Plan.model_fields["retries"].default))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_what_is_shown_as_a_default_is_the_default(tmp_path: Path, syntax: Syntax) -> None:
    def check(shown: BaseModel, path: str) -> int:
        count = 0
        for name, field in type(shown).model_fields.items():
            value = getattr(shown, name)
            if isinstance(value, BaseModel):
                count += check(value, f"{path}.{name}")
            elif field.default not in (None, [], {}) and not field.is_required():
                assert value == field.default, f"{path}.{name}"
                count += 1
        return count

    text = everything(syntax).replace('"first-batch"', '"batch"')
    plan = read(tmp_path, syntax, text)
    defaults = GuestDefaults.model_validate(load(syntax, text)["defaults"])
    parts = (plan.limits, plan.retries, plan.windows[0], defaults)
    assert sum(check(part, type(part).__name__) for part in parts) > 12
    assert plan.name == "batch"


@pytest.mark.parametrize("index", range(9))
def test_each_guest_has_a_command_line_that_parses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    monkeypatch.setenv("OS_AUTH_URL", "http://127.0.0.1:1")
    text = init_text("toml", "p")
    secrets = tmp_path / "root"
    secrets.mkdir()
    for name in ("vcenter.password", "ovirt.password", "ovirt-ca.pem"):
        (secrets / name).write_text("secret\n")
    lines = text.splitlines()
    guests = range(lines.index("[[guests]]"), lines.index("[limits]"))
    wanted = {number for number in guests if is_setting("toml", lines[number])}
    plan = read(tmp_path, "toml", used("toml", wanted).replace('"/root/', f'"{secrets}/'))
    options = virt_v2v.guest_options(virt_v2v.read(plan.guests[index].words()))
    parse_input(options.input)
    parse_output(options.output)
    assert len(plan.guests) == 9


def test_lines_are_not_longer_than_a_screen() -> None:
    for syntax in SYNTAXES:
        assert all(len(line) <= 100 for line in init_text(syntax, "plan.toml").splitlines())


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("plan.toml", "#:schema file://"),
        ("plan.yaml", "# yaml-language-server: $schema=file://"),
        ("plan.yml", "# yaml-language-server: $schema=file://"),
        ("plan", "#:schema file://"),
    ],
)
def test_it_is_written_once(tmp_path: Path, name: str, begin: str) -> None:
    path = tmp_path / name
    write_init(path)
    text = path.read_text()
    assert text.startswith(begin)
    assert text.splitlines()[0].endswith("/docs/schema/plan.json")
    assert f"v2v-async batch run {path} --dry-run" in text
    read_plan(path)
    with pytest.raises(UsageError, match="is there already"):
        write_init(path)
    assert path.read_text() == text


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be written: No such file"):
        write_init(tmp_path / "absent" / "plan.toml")


def test_a_name_that_is_no_word_of_a_shell() -> None:
    assert "batch run 'my plan.toml' --dry-run\n" in init_text("toml", "my plan.toml")
    for syntax in SYNTAXES:
        load(syntax, init_text(syntax, "a\nb = 3"))
        assert f"batch run plan.{syntax} --dry-run" in init_text(syntax, "a\nb = 3")
