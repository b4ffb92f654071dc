"""-o and what belongs to it, before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest

from v2v_async.errors import UsageError
from v2v_async.options import OutputOptions
from v2v_async.output.local import LocalOutput
from v2v_async.output.registry import KINDS, output_class, parse_output
from v2v_async.secret import Secret


def parse(**fields: Any) -> LocalOutput:
    output = parse_output(OutputOptions(**{"mode": "local", "storage": "/out", **fields}))
    assert isinstance(output, LocalOutput)
    return output


def test_every_output_has_a_class() -> None:
    for name in KINDS:
        assert output_class(name).name in (name, "local")


def test_an_unknown_mode_lists_the_known() -> None:
    with pytest.raises(UsageError, match="-o loca") as caught:
        parse_output(OutputOptions(mode="loca"))
    for known in ("local", "null", "kubevirt"):
        assert known in (caught.value.hint or "")


def test_raw_is_the_default_as_it_is_virt_v2vs() -> None:
    assert parse().disks.format == "raw"
    assert parse(format="qcow2").disks.format == "qcow2"


def test_compressed() -> None:
    assert parse(format="qcow2", options=(("compressed", None),)).disks.is_compressed
    assert parse(format="qcow2", options=(("compressed", "true"),)).disks.is_compressed
    assert not parse(options=(("compressed", "false"),)).disks.is_compressed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"storage": None}, "needs a directory"),
        ({"format": "vmdk"}, "-of vmdk"),
        ({"options": (("compressed", None),)}, "only possible with -of qcow2"),
        ({"options": (("compressed", "maybe"),), "format": "qcow2"}, "true or false"),
        (
            {"options": (("compressed", None),), "format": "qcow2", "allocation": "preallocated"},
            "exclude each other",
        ),
        ({"options": (("compresed", None),)}, "no option ‘-oo compresed’"),
        ({"password": Secret("x")}, "takes no -op"),
        ({"name": "../../etc/passwd"}, "it has a slash"),
        ({"name": "a\0b"}, "control character"),
        ({"name": ".."}, "names a directory"),
        ({"name": ""}, "it is empty"),
    ],
)
def test_wrong_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(**fields)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "fields",
    [{"storage": "/x"}, {"password": Secret("x")}, {"options": (("compressed", None),)}],
)
def test_null_refuses_what_makes_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="-o null"):
        parse_output(OutputOptions(mode="null", **fields))
