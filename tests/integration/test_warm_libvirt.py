"""Changed blocks of a libvirt guest that runs: what is told, what is read, what stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.integration.test_input_disk import content, quiet
from tests.warm_guest import WarmGuest, warm_guest
from v2v_async.copy.ranges import Ranges
from v2v_async.errors import SourceError, V2VError
from v2v_async.server import running_servers
from v2v_async.v2vdir import V2VDir
from v2v_async.warm.changed import MarkLostError, Opened
from v2v_async.warm.from_libvirt import LibvirtChanges, LibvirtDisk

pytestmark = pytest.mark.anyio
PREFIX = "v2v-async-test"
BLOCK = 65536


@pytest.fixture
def guest(short_tmp: Path) -> Iterator[WarmGuest]:
    require("libvirtd", "qemu-system-x86_64", "qemu-nbd", "qemu-img")
    with warm_guest(short_tmp) as made:
        yield made


@pytest.fixture
def place(short_tmp: Path) -> V2VDir:
    return V2VDir.create(short_tmp)


def changes(guest: WarmGuest) -> LibvirtChanges:
    disks = [
        LibvirtDisk(number + 1, f"hd{'ab'[number]}", str(path), path, "qcow2")
        for number, path in enumerate(guest.paths)
    ]
    return LibvirtChanges(guest.uri, "g", disks, PREFIX, guest.folder / "sockets")


async def check(opened: Opened, contents: list[bytearray]) -> list[Ranges | None]:
    """The export is the content of one moment; return what is told to have changed."""
    for delta, expected in zip(opened.deltas, contents, strict=True):
        assert await content(delta.endpoint) == expected
    return [delta.ranges for delta in opened.deltas]


async def test_what_changes_while_it_runs(guest: WarmGuest, place: V2VDir) -> None:
    """All at first, then what was written; one moment, whatever is written while it is read."""
    guest.start()
    source = changes(guest)
    async with running_servers(place) as servers:
        async with source.opened(None, f"{PREFIX}-1", place, servers, quiet) as opened:
            before = [bytearray(each) for each in guest.contents]
            guest.write(0, 5 * BLOCK, BLOCK)
            assert await check(opened, before) == [None, None]
            assert (opened.mark, opened.is_off) == (f"{PREFIX}-1", False)
        assert not guest.has_job()
        guest.write(0, 20 * BLOCK, 512)
        guest.write(1, 0, 2 * BLOCK, 0)
        async with source.opened(f"{PREFIX}-1", f"{PREFIX}-2", place, servers, quiet) as opened:
            before = [bytearray(each) for each in guest.contents]
            guest.write(1, 40 * BLOCK, 512)
            assert await check(opened, before) == [
                Ranges([(5 * BLOCK, BLOCK), (20 * BLOCK, BLOCK)]),
                Ranges([(0, 2 * BLOCK)]),
            ]
        await source.forget(f"{PREFIX}-2", quiet)
        assert guest.checkpoints() == [f"{PREFIX}-2"]
        async with source.opened(f"{PREFIX}-2", f"{PREFIX}-3", place, servers, quiet) as opened:
            told = await check(opened, guest.contents)
            assert told == [Ranges(), Ranges([(40 * BLOCK, BLOCK)])]
        await source.forget(None, quiet)
    assert guest.checkpoints() == []
    guest.stop()
    assert guest.bitmaps() == []
    assert sorted(path.name for path in (guest.folder / "images").iterdir()) == [
        "disk0.qcow2", "disk1.qcow2",
    ]  # fmt: skip
    assert list((guest.folder / "sockets").iterdir()) == []


async def test_a_pass_that_died_is_repeated_whole(guest: WarmGuest, place: V2VDir) -> None:
    """Its job and its mark are there still; what had changed before its mark is not forgotten."""
    guest.start()
    source = changes(guest)
    async with running_servers(place) as servers:
        async with source.opened(None, f"{PREFIX}-1", place, servers, quiet):
            pass
        guest.write(0, 3 * BLOCK, 512)
        died = source.opened(f"{PREFIX}-1", f"{PREFIX}-2", place, servers, quiet)
        await died.__aenter__()  # and its process is killed
        guest.write(0, 9 * BLOCK, 512)
        assert guest.has_job()
        async with source.opened(f"{PREFIX}-1", f"{PREFIX}-3", place, servers, quiet) as opened:
            [first, second] = await check(opened, guest.contents)
            assert first == Ranges([(3 * BLOCK, BLOCK), (9 * BLOCK, BLOCK)])
            assert second == Ranges()
            assert guest.checkpoints() == [f"{PREFIX}-1", f"{PREFIX}-3"]
        with suppress(V2VError):
            await died.__aexit__(None, None, None)
        await source.forget(None, quiet)


@pytest.mark.parametrize("died", [False, True], ids=["well", "died"])
async def test_when_it_is_off(guest: WarmGuest, place: V2VDir, died: bool) -> None:
    """Its bitmaps are in its images; with those of a pass that died."""
    guest.start()
    source = changes(guest)
    async with running_servers(place) as servers:
        async with source.opened(None, f"{PREFIX}-1", place, servers, quiet):
            pass
        guest.write(0, 7 * BLOCK, 512)
        if died:
            async with source.opened(f"{PREFIX}-1", f"{PREFIX}-2", place, servers, quiet):
                pass
        guest.write(1, BLOCK, 512)
        guest.stop()
        async with source.opened(f"{PREFIX}-1", f"{PREFIX}-3", place, servers, quiet) as opened:
            assert (opened.mark, opened.is_off) == (f"{PREFIX}-1", True)
            assert await check(opened, guest.contents) == [
                Ranges([(7 * BLOCK, BLOCK)]),
                Ranges([(BLOCK, BLOCK)]),
            ]
        await servers.stop_all()
        # Started and stopped again, it goes on counting.
        guest.start()
        guest.write(0, 0, 512)
        async with source.opened(f"{PREFIX}-1", f"{PREFIX}-4", place, servers, quiet) as opened:
            [first, _] = await check(opened, guest.contents)
            assert first == Ranges([(0, BLOCK), (7 * BLOCK, BLOCK)])
        guest.stop()
        await source.forget(None, quiet)
    assert guest.checkpoints() == []
    assert guest.bitmaps() == []


async def test_a_qemu_that_was_killed(guest: WarmGuest, place: V2VDir) -> None:
    """Nobody knows what its bitmaps have missed."""
    guest.start()
    source = changes(guest)
    async with running_servers(place) as servers:
        async with source.opened(None, f"{PREFIX}-1", place, servers, quiet):
            pass
        guest.write(0, 0, 512)
        guest.monitor('qemu-io -d ide0-0-0 "flush"')
        guest.kill()
        with pytest.raises(MarkLostError, match="has no bitmap|was not saved"):
            async with source.opened(f"{PREFIX}-1", f"{PREFIX}-2", place, servers, quiet):
                pass
        guest.start()
        with pytest.raises(MarkLostError):
            async with source.opened(f"{PREFIX}-1", f"{PREFIX}-3", place, servers, quiet):
                pass
        assert not guest.has_job()
        async with source.opened(None, f"{PREFIX}-4", place, servers, quiet) as opened:
            await check(opened, guest.contents)
        await source.forget(None, quiet)
        guest.stop()
        await source.forget(None, quiet)
    assert guest.checkpoints() == []
    assert guest.bitmaps() == []
    assert len(list((guest.folder / "images").iterdir())) == 2


async def test_what_others_made_stays(guest: WarmGuest, place: V2VDir) -> None:
    guest.start()
    other = "<domaincheckpoint><name>nightly</name></domaincheckpoint>"
    guest.domain.checkpointCreateXML(other, 0)
    source = changes(guest)
    async with running_servers(place) as servers:
        async with source.opened(None, f"{PREFIX}-1", place, servers, quiet):
            pass
        await source.forget(None, quiet)
        assert guest.checkpoints() == ["nightly"]
        theirs = guest.folder / "sockets" / "theirs"
        guest.domain.backupBegin(
            f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}'/>"
            "</domainbackup>",
            None,
            0,
        )
        with pytest.raises(SourceError, match="a backup job that is not of this migration"):
            async with source.opened(None, f"{PREFIX}-2", place, servers, quiet):
                pass
        assert guest.has_job()
        guest.domain.abortJob()
        await source.forget(None, quiet)
    guest.stop()
    await source.forget(None, quiet)
    assert guest.bitmaps() == ["nightly", "nightly"]


async def test_a_mark_that_somebody_deleted(guest: WarmGuest, place: V2VDir) -> None:
    guest.start()
    source = changes(guest)
    async with running_servers(place) as servers:
        with pytest.raises(MarkLostError, match="has no checkpoint"):
            async with source.opened(f"{PREFIX}-1", f"{PREFIX}-2", place, servers, quiet):
                pass
    assert guest.checkpoints() == []
    assert not guest.has_job()
