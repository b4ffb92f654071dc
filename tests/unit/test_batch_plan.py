"""Plans: every mistake at once, each with its line; patterns; the command line of a guest."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v2v_async.batch.plan.file import PlanError, read_plan
from v2v_async.errors import UsageError
from v2v_async.units import parse_duration


def write(folder: Path, text: str, name: str = "plan.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def mistakes(folder: Path, text: str, name: str = "plan.toml") -> list[str]:
    with pytest.raises(PlanError) as caught:
        read_plan(write(folder, text, name))
    return caught.value.mistakes


GOOD = """
name = "weekend"

[limits]
conversions = 2
scratch = "200G"
[limits.hosts."esx1.example.com"]
connections = 8
bandwidth = "400Mbit/s"

[[windows]]
days = ["sat", "sun"]
begin = 22:00:00
end = 06:00:00
bandwidth = "1000MB/s"

[retries]
attempts = 2
delay = "1m30s"

[defaults]
priority = 1
[defaults.output]
type = "local"
storage = "/srv/vms"
options = { compressed = true }

[[guests]]
name = "web"
input = { type = "disk", source = ["/vms/web.img", "/vms/data.img"], format = "raw" }
priority = 5

[[guests]]
name = "db"
[guests.input]
source = "db"
connection = "vpx://user@vc/DC/esx1?no_verify=1"
password_file = "/root/pw"
[guests.output]
name = "db-new"
format = "qcow2"
"""


def test_a_plan_with_defaults(tmp_path: Path) -> None:
    plan = read_plan(write(tmp_path, GOOD))
    assert (plan.name, plan.limits.conversions, plan.limits.scratch) == ("weekend", 2, 200 << 30)
    assert plan.limits.hosts["esx1.example.com"].bandwidth == 50_000_000
    assert (plan.retries.attempts, plan.retries.delay) == (2, 90.0)
    assert plan.windows[0].begin.hour == 22
    web, db = plan.guests
    assert (web.priority, db.priority) == (5, 1)
    assert web.words() == [
        *("-i", "disk", "-if", "raw", "-o", "local", "-os", "/srv/vms", "-oo", "compressed"),
        *("--", "/vms/web.img", "/vms/data.img"),
    ]
    assert db.words() == [
        *("-i", "libvirt", "-ic", "vpx://user@vc/DC/esx1?no_verify=1", "-ip", "/root/pw"),
        *("-o", "local", "-on", "db-new", "-os", "/srv/vms", "-of", "qcow2", "-oo", "compressed"),
        *("--", "db"),
    ]


def test_the_same_in_yaml(tmp_path: Path) -> None:
    plan = read_plan(
        write(
            tmp_path,
            "defaults: {output: {type: 'null'}, network: {networks: [lan:br0], bridges: [br0]}}\n"
            "guests:\n- name: a\n  input: {type: disk, source: a.img}\n"
            "  convert: {root: first, keys: ['all:clevis']}\n"
            "  copy: {verify: true, retries: 3}\n  options: [--echo-keys]\n",
            "plan.yaml",
        )
    )
    assert plan.guests[0].words() == [
        *("-i", "disk", "-o", "null", "--root", "first", "-n", "lan:br0", "-b", "br0"),
        *("--key", "all:clevis", "--verify", "--retries", "3", "--echo-keys", "--", "a.img"),
    ]


def test_every_mistake_has_its_line_and_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("name,ip\nx,1\n")
    found = mistakes(
        tmp_path,
        """name = "weekend"
[limits]
conversions = 0
scratch = "12X"
[limits.hosts."esx1"]
conections = 3
[defaults]
prioritty = 3
[[guests]]
name = "a"
input = { type = "disk", source = "a.img" }
[[guests]]
name = "a"
[guests.input]
source = "a"
transport = 3
[[guests]]
glob = "*.nothing"
[[guests]]
csv = "names.csv"
name = "{nome}"
[[guests]]
csv = "absent.csv"
[[guests]]
csv = "names.csv"
glob = "*"
[[guests]]
input.source = "nameless"
""",
    )
    assert found == [
        "plan.toml:3: limits.conversions: must be at least 1",
        "plan.toml:4: limits.scratch: ‘12X’ is not a size (write for example 512, 64K or 1.5G)",
        "plan.toml:6: limits.hosts.esx1.conections: there is no such setting",
        "plan.toml:8: prioritty: there is no such setting",
        "plan.toml:13: two guests are named ‘a’",
        "plan.toml:16: guests.input.transport: must be a text: write it in quotes",
        "plan.toml:18: ‘*.nothing’ gives no guests",
        "plan.toml:21: {nome} is neither a column nor a known word: {name}, {ip}",
        "plan.toml:23: ‘absent.csv’ can't be read: No such file or directory",
        "plan.toml:24: glob and csv exclude each other: write two [[guests]]",
        "plan.toml:27: guests.name: is missing",
    ]


def filled(folder: Path, text: str) -> str:
    (folder / "rows.csv").write_text("name,VM name\nweb,Web {1}\n")
    head = f'[[guests]]\ncsv = "rows.csv"\n[guests.input]\nsource = "{text}"\n'
    source = read_plan(write(folder, head)).guests[0].input.source
    assert isinstance(source, str)
    return source


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("{name}", "web"),
        ("{{{name}}}", "{web}"),
        ("{{name}}", "{name}"),
        ("a}}b{{", "a}b{"),
        ("{VM name}-{name}", "Web {1}-web"),
    ],
)
def test_columns_and_braces(tmp_path: Path, text: str, made: str) -> None:
    assert filled(tmp_path, text) == made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{name", "‘{’ stands alone: a column is {name}, a brace itself ‘{{’"),
        ("name}", "‘}’ stands alone: a column is {name}, a brace itself ‘}}’"),
        ("{}", "‘{’ stands alone: a column is {name}, a brace itself ‘{{’"),
        *(
            (text, f"{text} is neither a column nor a known word: {{name}}, {{VM name}}")
            for text in ("{0}", "{name.foo}", "{name!z}", "{name:>9999999999}", "{name[0]}")
        ),
    ],
)
def test_other_braces_are_mistakes_with_their_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(PlanError) as caught:
        filled(tmp_path, text)
    assert caught.value.mistakes == [f"plan.toml:4: {told}"]


@given(st.text(alphabet="{}a!:.[]0", max_size=12))
def test_any_braces_are_filled_or_a_mistake(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    with suppress(PlanError):
        filled(tmp_path_factory.mktemp("plan"), text)


def test_mistakes_are_in_the_words_of_who_writes_a_plan(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        """version = 2
limits.hosts = { esx1 = 3 }
limits.disks = 1.5
retries = 3
[[windows]]
days = ["monday"]
begin = "22"
end = "25:00"
[[guests]]
name = ""
input = { source = 3 }
copy = { verify = "perhaps" }
[[guests]]
name = "b"
[guests.input]
source = ["x", 4]
options = { a = 3 }
[[guests]]
name = "c"
options = "--parallel 2"
output.allocation = "thick"
""",
    )
    assert found == [
        "plan.toml:1: version: must be 1",
        "plan.toml:2: limits.hosts.esx1: is a table, with settings of its own",
        "plan.toml:3: limits.disks: must be a whole number",
        "plan.toml:4: retries: is a table, with settings of its own",
        "plan.toml:6: windows.days: must be 'mon', 'tue', 'wed', 'thu', 'fri', 'sat' or 'sun'",
        'plan.toml:7: windows.begin: is a time of the day: "22:00"',
        'plan.toml:8: windows.end: is a time of the day: "22:00"',
        "plan.toml:10: guests.name: is empty",
        "plan.toml:11: guests.input.source: must be a text or a list of texts",
        "plan.toml:12: guests.copy.verify: must be true or false",
        "plan.toml:16: guests.input.source: must be a text: write it in quotes",
        "plan.toml:17: guests.input.options.a: must be a text or true or false",
        "plan.toml:20: guests.options: is a list: write it in [ ]",
        "plan.toml:21: guests.output.allocation: must be 'sparse' or 'preallocated'",
    ]


def test_misspelt_tables(tmp_path: Path) -> None:
    text = (
        'name = "x"\n\n[[guest]]\nname = "a"\n[[guest]]\nname = "b"\n[limit.hosts.a]\ndisks = 3\n'
    )
    assert mistakes(tmp_path, text) == [
        "plan.toml:3: guest: did you mean [[guests]]?",
        "plan.toml:7: limit: did you mean ‘limits’?",
    ]
    assert mistakes(tmp_path, "name: x\nguest:\n- name: a\n", "p.yaml") == [
        "p.yaml:2: guest: did you mean [[guests]]?"
    ]


def test_keys_that_are_there_twice(tmp_path: Path) -> None:
    text = (
        "guests:\n- name: a\n  input: {source: x}\n  name: b\nlimits: {disks: 1}\n"
        "limits:\n  disks: 2\n"
    )
    assert mistakes(tmp_path, text, "p.yaml") == [
        "p.yaml:4: guests.name: is there twice, first in line 2",
        "p.yaml:6: limits: is there twice, first in line 5",
    ]


def test_lines_of_yaml(tmp_path: Path) -> None:
    text = "name: x\nguests:\n  - name: a\n    input:\n      tipe: disk\n  - 3\n"
    assert mistakes(tmp_path, text, "p.yml") == [
        "p.yml:5: guests.input.tipe: there is no such setting",
        "p.yml:6: a guest is a table with a name and a source",
    ]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("a = ", "p.toml", "p.toml: Invalid value"),
        ("a: [", "p.yaml", "p.yaml: while parsing"),
        ("- 1\n", "p.yaml", "p.yaml:1: a plan is a table"),
        ("name = 'x'\n", "p.toml", "p.toml:1: no guests"),
        ("guests = 3\n", "p.toml", "p.toml:1: no guests"),
        ("", "p.yaml", "p.yaml:1: a plan is a table"),
    ],
)
def test_what_is_no_plan(tmp_path: Path, text: str, name: str, message: str) -> None:
    assert mistakes(tmp_path, text, name)[0].startswith(message)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read: No such file"):
        read_plan(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_plan(tmp_path / "binary.toml")


def test_a_glob_makes_a_guest_of_each_file(tmp_path: Path) -> None:
    for name in ("b.vmx", "a.vmx", "c.txt"):
        (tmp_path / "vms" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "vms" / name).touch()
    plan = read_plan(
        write(
            tmp_path,
            '[defaults]\noutput.type = "null"\n'
            '[[guests]]\nglob = "vms/*.vmx"\nname = "{folder}-{name}"\ninput.type = "vmx"\n',
        )
    )
    assert [(each.name, each.input.source) for each in plan.guests] == [
        ("vms-a", str(tmp_path / "vms" / "a.vmx")),
        ("vms-b", str(tmp_path / "vms" / "b.vmx")),
    ]


def test_a_csv_makes_a_guest_of_each_row(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("name, pool\nweb1,fast\nweb2,slow\n")
    plan = read_plan(
        write(
            tmp_path,
            '[[guests]]\ncsv = "names.csv"\ninput.source = "{name}"\noutput.storage = "{pool}"\n',
        )
    )
    assert [(each.name, each.input.source, each.output.storage) for each in plan.guests] == [
        ("web1", "web1", "fast"),
        ("web2", "web2", "slow"),
    ]


def test_names_that_a_csv_has_twice(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("name\nweb1\nweb2\nweb1\n")
    assert mistakes(tmp_path, '[[guests]]\ncsv = "names.csv"\n') == [
        "plan.toml:1: two guests are named ‘web1’"
    ]


def test_all_columns_that_there_are_not(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("name\nweb1\nweb2\n")
    text = (
        '[[guests]]\ncsv = "names.csv"\ninput.source = "{nome}"\noutput.storage = "{pol}"\n'
        'network.networks = ["{"]\n'
    )
    assert mistakes(tmp_path, text) == [
        "plan.toml:3: {nome} is neither a column nor a known word: {name}",
        "plan.toml:4: {pol} is neither a column nor a known word: {name}",
        "plan.toml:5: ‘{’ stands alone: a column is {name}, a brace itself ‘{{’",
    ]


def test_a_glob_whose_input_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.vmx").touch()
    assert mistakes(tmp_path, '[[guests]]\nglob = "*.vmx"\ninput = "vmx"\n') == [
        "plan.toml:3: guests.input: is a table, with settings of its own"
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("1h30m", 5400), ("2d", 172800), ("1.5s", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "3 weeks", "-1s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.text(max_size=200) | st.lists(st.sampled_from(GOOD.splitlines())).map("\n".join))
def test_any_text_is_a_plan_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    for name in ("p.toml", "p.yaml"):
        with suppress(UsageError):
            read_plan(write(folder, text, name))
