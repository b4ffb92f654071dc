"""The images API of the real ovirt-imageio daemon: what is sent, sent again, and given up."""

from __future__ import annotations

import errno
import random
import re
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ovirt_upload import Cut, CuttingProxy
from tests.ovirt_upload import imageio as imageio
from tests.ovirt_upload import own_imageio as own_imageio
from tests.services.imageio import Imageio
from tests.waiting import listens, wait_until
from v2v_async.output.ovirt import imageio as client
from v2v_async.output.ovirt.imageio import ImageioError, Images

MIB = 1 << 20
SIZE = 16 * MIB


class Place:
    """A disk of the daemon's, and clients of it."""

    def __init__(self, daemon: Imageio, disk: Path) -> None:
        self.daemon = daemon
        self.disk = disk
        self.ticket = str(uuid.uuid4())
        self.port = daemon.port
        self.opened: list[Images] = []

    def allow(self, url: str = "", **fields: Any) -> None:
        """Give the daemon the ticket."""
        given = {
            "uuid": self.ticket,
            "size": SIZE,
            "ops": ["read", "write"],
            "timeout": 300,
            "sparse": True,
            "url": url or f"file://{self.disk}",
        }
        self.daemon.add_ticket({**given, **fields})

    def images(self, **fields: Any) -> Images:
        """A client; not connected yet."""
        ca_file = str(self.daemon.certificate)
        given = {"verify": True, "ca_file": ca_file}
        url = f"https://127.0.0.1:{self.port}/images/{self.ticket}"
        made = Images(url, **{**given, **fields})
        self.opened.append(made)
        return made

    def opened_images(self, **fields: Any) -> Images:
        made = self.images(**fields)
        made.open()
        return made


@pytest.fixture
def place(imageio: Imageio, short_tmp: Path) -> Iterator[Place]:
    yield from _place(imageio, short_tmp)


@pytest.fixture
def own_place(own_imageio: Imageio, short_tmp: Path) -> Iterator[Place]:
    yield from _place(own_imageio, short_tmp)


def _place(daemon: Imageio, folder: Path) -> Iterator[Place]:
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    made = Place(daemon, disk)
    yield made
    for images in made.opened:
        images.close()
    daemon.remove_ticket(made.ticket)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSES_S", (0.01, 0.01, 0.05, 0.1))


def read(images: Images, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    images.read(memoryview(buffer), offset)
    return bytes(buffer)


def test_written_zeroed_flushed_and_read_back(place: Place) -> None:
    place.allow()
    with place.disk.open("r+b") as file:
        file.write(b"\xff" * SIZE)
    images = place.opened_images()
    assert images.can_zero
    assert images.can_flush
    noise = random.Random(1).randbytes(3 * MIB + 517)
    images.write(noise, 12345)
    images.write(b"end", SIZE - 3, flush=True)
    images.zero(8 * MIB, 4 * MIB)
    images.flush()
    expected = bytearray(b"\xff" * SIZE)
    expected[12345 : 12345 + len(noise)] = noise
    expected[SIZE - 3 :] = b"end"
    expected[8 * MIB : 12 * MIB] = bytes(4 * MIB)
    assert place.disk.read_bytes() == expected
    assert read(images, 12000, 5000) == expected[12000:17000]
    assert place.disk.stat().st_blocks * 512 <= 12 * MIB + 65536, "zeroes take no room"


def test_zeroing_is_cut_into_pieces(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MOST_ZERO", MIB)
    place.allow()
    images = place.opened_images()
    images.write(b"x" * SIZE, 0)
    began = len(place.daemon.log.read_bytes())
    images.zero(MIB // 2, 3 * MIB, flush=True)
    asked = re.findall(rb"ZERO size=(\d+)", place.daemon.log.read_bytes()[began:])
    assert asked == [str(MIB).encode()] * 3
    content = place.disk.read_bytes()
    assert content == b"x" * (MIB // 2) + bytes(3 * MIB) + b"x" * (SIZE - 7 * MIB // 2)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


@pytest.fixture
def served(place: Place, short_tmp: Path) -> Iterator[Place]:
    """The disk behind a qemu-nbd, as on oVirt's hosts: files have one connection only."""
    path = short_tmp / "nbd"
    argv = ["qemu-nbd", "--persistent", "--shared=16", f"--socket={path}", "--format=raw"]
    server = subprocess.Popen([*argv, "--discard=unmap", str(place.disk)])
    try:
        wait_until(lambda: listens(path), "qemu-nbd listens", of=server)
        place.allow(f"nbd:unix:{path}")
        yield place
        for images in place.opened:
            images.close()
        place.daemon.remove_ticket(place.ticket)
    finally:
        server.terminate()
        server.wait()


def test_many_threads_share_the_connections(served: Place) -> None:
    place = served
    images = place.opened_images()

    def work(number: int) -> None:
        for step in range(8):
            offset = (step * 16 + number) * 128 * 1024
            images.write(bytes([number + 1]) * 100_000, offset)
            if step % 4 == 3:
                images.flush()
            assert read(images, offset, 100_000) == bytes([number + 1]) * 100_000

    in_threads(16, work)
    info = place.daemon.ticket(place.ticket)
    assert info is not None
    assert 2 <= info["connections"] <= images.connections == client.MOST_CONNECTIONS
    content = place.disk.read_bytes()
    for number in range(16):
        assert content[number * 128 * 1024] == number + 1


@pytest.mark.parametrize("is_local", [True, False])
def test_the_unix_socket_is_for_the_same_machine(place: Place, is_local: bool) -> None:
    place.allow()
    began = len(place.daemon.log.read_bytes())
    images = place.opened_images(is_local=is_local)
    images.write(b"abc", 0)
    assert images.is_on_unix_socket == is_local
    writes = re.findall(rb"\[(\S+)\] WRITE", place.daemon.log.read_bytes()[began:])
    assert writes == [b"local" if is_local else b"127.0.0.1"]


def test_another_machines_unix_socket_is_not_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon names its socket; where there is none of that name, HTTPS does it."""
    place.allow()
    ask = Images._options

    def lie(self: Images, slot: Any, *, tries: int = 3) -> dict[str, Any]:
        return {**ask(self, slot, tries=tries), "unix_socket": "\0/nowhere"}

    monkeypatch.setattr(Images, "_options", lie)
    images = place.opened_images(is_local=True)
    assert not images.is_on_unix_socket
    images.write(b"abc", 0)
    assert place.disk.read_bytes()[:3] == b"abc"


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("after", [0, 700, 40_000, MIB])
def test_a_connection_that_is_cut(served: Place, after: int) -> None:
    """In the handshake, in the request's headers, in its data: sent again, and nothing is lost."""
    place = served
    with CuttingProxy(place.daemon.port) as proxy:
        place.port = proxy.port
        images = place.opened_images()
        proxy.end_all()  # the next request finds its connection dead
        proxy.cut = Cut(after, 3)
        noise = random.Random(after).randbytes(4 * MIB)
        in_threads(4, lambda n: images.write(noise[n * MIB : (n + 1) * MIB], n * MIB))
        if after < MIB:
            assert proxy.cuts == 3
        images.flush()
        assert read(images, 0, 4 * MIB) == noise
        images.close()
    assert place.disk.read_bytes()[: 4 * MIB] == noise


@pytest.mark.usefixtures("hasty")
def test_a_network_that_stays_away(place: Place) -> None:
    place.allow()
    with CuttingProxy(place.daemon.port) as proxy:
        place.port = proxy.port
        images = place.opened_images()
        images.write(b"a", 0)
        proxy.refuses = True
        proxy.end_all()
        acts: list[Callable[[], None]] = [lambda: images.write(b"b", 0), images.flush]
        for act in acts:
            with pytest.raises(ImageioError, match="can't be reached") as caught:
                act()
            assert caught.value.errno == errno.EIO
        proxy.refuses = False
        images.write(b"c", 0)  # and it works again when it is back
        images.close()
    assert place.disk.read_bytes()[:1] == b"c"


@pytest.mark.usefixtures("hasty")
def test_a_daemon_that_was_restarted_has_no_ticket(own_place: Place) -> None:
    own_place.allow()
    images = own_place.opened_images()
    images.write(b"a", 0)
    own_place.daemon.kill()
    own_place.daemon.start()
    with pytest.raises(ImageioError, match="403") as caught:
        images.write(b"b", 0)
    assert caught.value.errno == errno.EPERM
    assert own_place.ticket not in str(caught.value)


def test_a_ticket_that_ended(place: Place) -> None:
    place.allow()
    images = place.opened_images()
    images.write(b"a", 0)
    place.daemon.set_timeout(place.ticket, 0)
    acts: list[Callable[[], None]] = [
        lambda: images.write(b"b" * MIB, 0),
        lambda: images.zero(0, 512),
        images.flush,
    ]
    for act in acts:
        with pytest.raises(ImageioError, match="403") as caught:
            act()
        assert caught.value.errno == errno.EPERM
        assert place.ticket not in str(caught.value)
    with pytest.raises(ImageioError, match="403"):
        place.images().open()


def test_a_full_disk_is_no_more_than_an_error(place: Place, short_tmp: Path) -> None:
    path = short_tmp / "full"
    argv = ["nbdkit", "-f", "-U", str(path), "--filter=error", "memory", str(SIZE)]
    argv += ["error=ENOSPC", "error-pwrite-rate=100%"]
    server = subprocess.Popen(argv)
    try:
        wait_until(lambda: listens(path), "nbdkit listens", of=server)
        place.allow(f"nbd:unix:{path}")
        images = place.opened_images()
        with pytest.raises(ImageioError, match="storage full.*daemon.log") as caught:
            images.write(b"a" * 4096, 0)
        assert caught.value.errno == errno.EIO, "the daemon does not tell which error it was"
        images.close()
        place.daemon.remove_ticket(place.ticket)
    finally:
        server.kill()
        server.wait()


def test_an_idle_transfer_is_kept_alive(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a conversion takes hours; each word of ours gives the ticket its full time again."""
    monkeypatch.setattr(client, "IDLE_S", 0.1)
    place.allow(timeout=3, inactivity_timeout=2)
    images = place.opened_images()
    images.write(b"a", 0)
    first = place.daemon.ticket(place.ticket)
    assert first is not None

    def has_outlived() -> bool:
        now = place.daemon.ticket(place.ticket)
        assert now is not None
        assert now["idle_time"] <= 1
        return bool(now["expires"] > first["expires"] + 2)

    wait_until(has_outlived, "the ticket has outlived its first time")
    images.write(b"b", 0)
    assert place.disk.read_bytes()[:1] == b"b"


def test_a_certificate_that_is_not_trusted(place: Place) -> None:
    place.allow()
    with pytest.raises(ImageioError, match="is not trusted"):
        place.images(ca_file=None).open()
    place.images(ca_file=None, verify=False).open()


def test_something_else_answers(place: Place) -> None:
    place.allow()
    images = place.images()
    images._path = "/info/"
    with pytest.raises(ImageioError, match="405"):
        images.open()
