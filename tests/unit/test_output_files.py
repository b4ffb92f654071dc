"""Files that get their names at the very end."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from v2v_async.errors import TargetError
from v2v_async.output import files
from v2v_async.v2vdir import OutputFile, V2VDir


def make(directory: Path, *names: str) -> list[OutputFile]:
    records = []
    for name in names:
        final = directory / name
        temporary = files.temporary_for(final)
        files.make_empty(temporary)
        temporary.write_text(f"new {name}")
        records.append(OutputFile(temporary=str(temporary), final=str(final)))
    return records


def content(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in directory.iterdir() if p.is_file()}


def test_temporary_names_are_hidden_beside_the_final_one_and_differ() -> None:
    final = Path("/out/web-sda")
    first, second = files.temporary_for(final), files.temporary_for(final)
    assert first != second
    assert first.parent == final.parent
    assert re.fullmatch(r"\.web-sda\.[0-9a-f]{8}\.partial", first.name)


def test_a_name_that_is_too_long_is_refused_before_anything_is_made() -> None:
    files.temporary_for(Path("/out") / ("é" * 118))
    with pytest.raises(TargetError, match="too long") as caught:
        files.temporary_for(Path("/out") / ("é" * 119))
    assert "-on" in (caught.value.hint or "")


def test_make_empty_follows_no_link_and_the_umask_rules(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    with pytest.raises(TargetError, match="File exists"):
        files.make_empty(link)
    assert victim.read_text() == "precious"
    before = os.umask(0o027)
    try:
        files.make_empty(tmp_path / "new")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


@pytest.mark.anyio
async def test_raw_files_sparse_and_preallocated(tmp_path: Path) -> None:
    size = (5 << 20) + 512
    for is_preallocated in (False, True):
        path = tmp_path / str(is_preallocated)
        files.make_empty(path)
        await files.make_raw(path, size, preallocated=is_preallocated)
        status = path.stat()
        assert status.st_size == size
        assert (status.st_blocks * 512 >= size) == is_preallocated


@pytest.mark.anyio
async def test_no_room_is_said_before_any_of_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_space", lambda directory: (4 << 20) - 1)
    path = tmp_path / "x"
    files.make_empty(path)
    with pytest.raises(TargetError, match="No space left") as caught:
        await files.make_raw(path, 4 << 20, preallocated=True)
    assert "-os DIR" in (caught.value.hint or "")
    assert path.stat().st_blocks == 0
    await files.make_raw(path, 4 << 20, preallocated=False)


def test_publish_replaces_earlier_files_and_leaves_nothing_else(
    v2vdir: V2VDir, tmp_path: Path
) -> None:
    (tmp_path / "web-sda").write_text("old")
    (tmp_path / "other").write_text("not ours")
    records = make(tmp_path, "web-sda", "web.xml")
    files.publish(v2vdir, records)
    assert content(tmp_path) == {
        "web-sda": "new web-sda",
        "web.xml": "new web.xml",
        "other": "not ours",
    }
    assert v2vdir.state.files == []
    files.remove_temporary(records)
    assert len(content(tmp_path)) == 3, "what has its name is not removed any more"


def test_when_a_rename_fails_the_earlier_files_are_back(v2vdir: V2VDir, tmp_path: Path) -> None:
    (tmp_path / "web-sda").write_text("old")
    (tmp_path / "web.xml").mkdir()
    (tmp_path / "web.xml" / "in-the-way").write_text("x")
    records = make(tmp_path, "web-sda", "web-sdb", "web.xml")
    with pytest.raises(TargetError, match=r"can't rename .*web\.xml") as caught:
        files.publish(v2vdir, records)
    assert "directory" in (caught.value.hint or "")
    files.remove_temporary(records)
    assert content(tmp_path) == {"web-sda": "old"}
    assert (tmp_path / "web.xml" / "in-the-way").exists()
    assert v2vdir.state.files == []


def test_a_link_in_the_place_of_a_final_name_is_replaced_not_followed(
    v2vdir: V2VDir, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "web-sda").symlink_to(outside)
    files.publish(v2vdir, make(directory, "web-sda"))
    assert outside.read_text() == "precious"
    assert content(directory) == {"web-sda": "new web-sda"}


def test_removing_what_is_not_there_does_not_fail(tmp_path: Path) -> None:
    files.remove_temporary([OutputFile(temporary=str(tmp_path / "a"), final=str(tmp_path / "b"))])


def noted(v2vdir: V2VDir, records: list[OutputFile]) -> list[OutputFile]:
    """Note files as setup does, and say which they are."""
    for record in records:
        v2vdir.add_output(record)
        files.identify(v2vdir, Path(record.temporary))
    return v2vdir.state.outputs


def test_names_given_by_a_process_that_was_killed_are_taken_back(
    v2vdir: V2VDir, tmp_path: Path
) -> None:
    """One file had its name, one not yet; and it may be killed again, in the middle of this."""
    (tmp_path / "web-sda").write_text("old")
    (tmp_path / "web.xml").write_text("old too")
    first, second = noted(v2vdir, make(tmp_path, "web-sda", "web.xml"))
    links = [each.temporary.removesuffix("partial") + "previous" for each in (first, second)]
    v2vdir.update(files=links, is_publishing=True)
    os.link(first.final, links[0])
    os.link(second.final, links[1])
    os.rename(first.temporary, first.final)
    for _ in range(2):
        files.unpublish(v2vdir)
        assert content(tmp_path) == {
            "web-sda": "old",
            "web.xml": "old too",
            Path(first.temporary).name: "new web-sda",
            Path(second.temporary).name: "new web.xml",
        }
        assert v2vdir.state.files == []
    os.link(first.final, links[0])
    os.unlink(first.final)
    v2vdir.update(files=links, is_publishing=True)
    files.unpublish(v2vdir)
    assert (tmp_path / "web-sda").read_text() == "old"
    assert not Path(links[0]).exists()


def test_a_file_of_somebody_else_keeps_its_name(v2vdir: V2VDir, tmp_path: Path) -> None:
    """It came when ours had gone, or in place of ours."""
    [record] = noted(v2vdir, make(tmp_path, "web-sda"))
    os.unlink(record.temporary)
    (tmp_path / "web-sda").write_text("theirs")
    files.unpublish(v2vdir)
    assert content(tmp_path) == {"web-sda": "theirs"}
    # The file system gives numbers again, so that theirs may be known by the number of ours.
    record = record.model_copy(update={"inode": 1})
    link = record.temporary.removesuffix("partial") + "previous"
    Path(link).write_text("theirs, of before")
    v2vdir.update(files=[link], outputs=[record], is_publishing=True)
    files.unpublish(v2vdir)
    assert (tmp_path / "web-sda").read_text() == "theirs"
    assert Path(link).read_text() == "theirs, of before"


def test_the_last_one_says_that_the_guest_is_made(v2vdir: V2VDir, tmp_path: Path) -> None:
    """And where that can't be said, the earlier files are back."""
    (tmp_path / "web-sda").write_text("old")
    records = make(tmp_path, "web-sda", "web.xml")
    update = V2VDir.update

    def full(self: V2VDir, **changes: object) -> object:
        if "is_finalized" in changes:
            raise OSError(28, os.strerror(28))
        return update(self, **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(V2VDir, "update", full)
        with pytest.raises(TargetError, match="No space"):
            files.publish(v2vdir, records, is_last=True)
    assert content(tmp_path) == {"web-sda": "old"}
    records = make(tmp_path, "web-sda", "web.xml")
    files.publish(v2vdir, records, is_last=True)
    assert v2vdir.state.is_finalized
    assert content(tmp_path) == {"web-sda": "new web-sda", "web.xml": "new web.xml"}
