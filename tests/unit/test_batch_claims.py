"""What guests take, so that nobody else takes it as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from v2v_async.batch.preflight.claims import (
    Taken,
    address_of,
    collisions,
    taken_sources,
    taken_targets,
)
from v2v_async.batch.preflight.target_files import TargetFiles, target_files
from v2v_async.batch.record.folder import claim
from v2v_async.model import SourceDisk, SourceGuest
from v2v_async.options import InputOptions, OutputOptions
from v2v_async.output.registry import parse_output
from v2v_async.secret import Secret


def source(name: str, *disks: SourceDisk) -> SourceGuest:
    return SourceGuest(name=name, memory=1 << 30, vcpus=1, disks=list(disks))


def disk(path: str | Path, index: int = 1, files: list[str] | None = None) -> SourceDisk:
    return SourceDisk(
        index=index, source=str(path), format="raw", size=1 << 20, files=files or [], allocated=0
    )


def of_file(guest: str, path: Path) -> list[Taken]:
    return taken_sources(
        guest, InputOptions("disk", (str(path),)), source(guest, disk(path, files=[str(path)]))
    )


def identities(taken: list[Taken]) -> set[tuple[str, str]]:
    return {(each.claim.kind, each.claim.identity) for each in taken}


@pytest.mark.parametrize("other", ["link", "hard", "dots"])
def test_a_file_by_another_name(tmp_path: Path, other: str) -> None:
    path = tmp_path / "web.img"
    path.write_bytes(b"x")
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    (tmp_path / "there").mkdir()
    again = tmp_path / "there" / ".." / "web.img" if other == "dots" else tmp_path / other
    assert identities(of_file("a", path)) & identities(of_file("b", again))
    (problem,) = collisions([*of_file("a", path), *of_file("b", again)], {})
    assert problem.guests == ("a", "b")
    assert f"the same source, ‘{path}’" in problem.message


def test_a_base_image_may_be_shared(tmp_path: Path) -> None:
    """Linked clones differ in their own files; what is under them is only read."""
    base = tmp_path / "base.img"
    tops = [tmp_path / "a.qcow2", tmp_path / "b.qcow2"]
    for path in (base, *tops):
        path.write_bytes(b"x")
    taken = [
        each
        for top in tops
        for each in taken_sources(
            top.stem,
            InputOptions("disk", (str(top),)),
            source(top.stem, disk(top, files=[str(top), str(base)])),
        )
    ]
    assert collisions(taken, {}) == []


def test_a_guest_that_libvirt_knows(tmp_path: Path) -> None:
    def taken(guest: str, uri: str | None) -> set[tuple[str, str]]:
        options = InputOptions("libvirt", ("x",), connection=uri)
        return identities(taken_sources(guest, options, source("web")))

    assert taken("a", "qemu+ssh://root@Host/system") == taken("b", "qemu://host/system?no_tty=1")
    assert taken("a", "qemu:///system") != taken("a", "qemu:///session")
    assert taken("a", "qemu:///s?socket=/1") != taken("a", "qemu:///s?socket=/2")


def test_a_guest_of_vcenter_and_its_disks() -> None:
    def taken(uri: str) -> set[tuple[str, str]]:
        options = InputOptions("libvirt", ("x",), connection=uri)
        return identities(taken_sources("a", options, source("web", disk("[ds1] web/web.vmdk"))))

    first = taken("vpx://joe@vc.example.com/DC/h1")
    assert first == taken("vpx://ann@VC.example.com/DC/h2?no_verify=1")
    assert first == {
        ("guest", "vc.example.com web"),
        ("disk", "vc.example.com [ds1] web/web.vmdk"),
    }


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("nbd://storage/web", "nbds://joe@STORAGE:10809/web?tls-certificates=/x"),
        ("nbd+unix:///web?socket=/run/a", "nbd+unix:///web?socket=/run/../run/a"),
        ("ssh://root@esx1/vmfs/web.vmdk", "ssh://joe@esx1:22/vmfs/web.vmdk"),
        ("https://h/web.img", "https://H:443/web.img"),
    ],
)
def test_addresses_that_mean_the_same(uri: str, same: str) -> None:
    assert address_of(uri) == address_of(same)


@pytest.mark.parametrize(
    ("uri", "other"),
    [
        ("nbd://storage/web", "nbd://storage:10810/web"),
        ("nbd+unix:///web?socket=/run/a", "nbd+unix:///web?socket=/run/b"),
        ("https://h/get?disk=1", "https://h/get?disk=2"),
    ],
)
def test_addresses_that_differ(uri: str, other: str) -> None:
    assert address_of(uri) != address_of(other)


def test_no_secret_is_in_a_claim() -> None:
    address = address_of("https://joe:hunter2@h/web.img?token=hunter3")
    assert "hunter" not in address
    assert "joe" not in address


def targets(guest: str, options: OutputOptions, name: str, tmpdir: Path) -> list[Taken]:
    output = parse_output(options)
    given = source(name, disk("/x"), disk("/y", 2))
    files = target_files(output, options, name, given, tmpdir=tmpdir)
    return taken_targets(guest, output, options, name, files)


def test_two_guests_of_one_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "same").symlink_to(out)
    one = targets("a", OutputOptions(mode="local", storage=str(out)), "web", tmp_path)
    two = targets("b", OutputOptions(mode="qemu", storage=str(tmp_path / "same")), "web", tmp_path)
    other = targets("c", OutputOptions(mode="local", storage=str(out)), "web2", tmp_path)
    (problem,) = collisions([*one, *two, *other], {})
    assert problem.guests == ("a", "b")
    assert "same target" in problem.message
    assert "output.name" in (problem.hint or "")
    assert identities(one) == {
        ("file", f"{out}/web-sda"),
        ("file", f"{out}/web-sdb"),
        ("file", f"{out}/web.xml"),
    }


def test_disks_that_a_plan_names_twice(tmp_path: Path) -> None:
    pairs = (("disk", str(tmp_path / "1.img")), ("disk", str(tmp_path / "2.img")))
    options = OutputOptions(mode="kubevirt", storage=str(tmp_path), options=pairs)
    taken = [*targets("a", options, "web", tmp_path), *targets("b", options, "db", tmp_path)]
    (problem,) = collisions(taken, {})
    assert str(tmp_path / "1.img") in problem.message
    place = tmp_path / "1.img"
    place.write_bytes(b"x")
    (tmp_path / "2.img").write_bytes(b"x")
    there = OutputOptions(
        mode="kubevirt", storage=str(tmp_path), options=(*pairs, ("create", "false"))
    )
    kinds = {kind for kind, _ in identities(targets("a", there, "web", tmp_path))}
    assert kinds == {"file", "inode"}, "what is written in place may have other names"


def test_targets_that_are_not_files(tmp_path: Path) -> None:
    engine = OutputOptions(
        mode="rhv-upload",
        connection="https://joe@engine/ovirt-engine/api",
        storage="data",
        password=Secret("x"),
        options=(("rhv-disk-uuid", "11111111-2222-3333-4444-555555555555"),),
    )
    taken = targets("a", engine, "web", tmp_path)
    assert ("guest", "engine web") in identities(taken)
    assert len(taken) == 2
    glance = OutputOptions(mode="glance", options=(("os-cloud", "lab"),))
    assert identities(targets("a", glance, "web", tmp_path)) == {("image", "lab web")}
    assert targets("a", OutputOptions(mode="null"), "web", tmp_path) == []


def test_a_guest_that_another_one_makes(tmp_path: Path) -> None:
    path = tmp_path / "web-sda"
    path.write_bytes(b"x")
    made = targets("a", OutputOptions(mode="local", storage=str(tmp_path)), "web", tmp_path)
    (problem,) = collisions([*made, *of_file("b", path)], {})
    assert f"‘{path}’ is written for ‘a’ and read for ‘b’" in problem.message
    # Not only its own disk: what is under it too.
    (problem,) = collisions(made, {"c": ["/other", str(path)]})
    assert problem.guests == ("a", "c")
    assert collisions(made, {"a": [str(path)]}) == [], "its output refuses that with better words"


def test_claims_hold_between_runs(tmp_path: Path) -> None:
    path = tmp_path / "web.img"
    path.write_bytes(b"x")
    os.link(path, tmp_path / "hard.img")
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
    assert claim(tmp_path, "one", [each.claim for each in of_file("a", path)]) == []
    conflicts = claim(tmp_path, "two", [each.claim for each in of_file("b", tmp_path / "hard.img")])
    assert [(each.run, each.other_guest) for each in conflicts] == [("one", "a")]


def test_nothing_is_known_of_disks_whose_source_failed() -> None:
    output = OutputOptions(mode="libvirt", connection="test:///default", name="web")
    taken = taken_targets("a", parse_output(output), output, "web", None)
    assert identities(taken) == {("guest", "test:///default web")}
    assert TargetFiles().room == ()
