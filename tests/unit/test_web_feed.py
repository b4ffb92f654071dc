"""What readers of a stream have not been sent yet, and the address of --serve."""

from __future__ import annotations

import socket

import anyio
import pytest

from tests.web_batch import GIB, made
from v2v_async.errors import UsageError
from v2v_async.events import Bytes, Event
from v2v_async.web.feed import Changed, EventQueue, Feed, TooManyReadersError
from v2v_async.web.guard import is_loopback
from v2v_async.web.listening import Address, listen, look_up, parse_address

pytestmark = pytest.mark.anyio


def progress(copied: int, *, guest: str = "a", disk: int = 1, type_: str = "progress") -> Event:
    return made(type_, guest, step="copy", disk=disk, bytes=Bytes(total=GIB, copied=copied))


def test_only_the_last_progress_of_a_disk_is_kept() -> None:
    queue = EventQueue()
    sent = [
        made("started", "a", step="copy"),
        progress(1),
        progress(1, disk=2),
        progress(1, guest="b"),
        made("warning", "a", text="slow"),
        progress(2),
        progress(3, type_="verifying"),
    ]
    for number, event in enumerate(sent, 1):
        queue.put(number, event)
    has_lost, taken = queue.take()
    assert not has_lost
    # In the order in which they happened: the second of disk 1 is behind the warning.
    assert taken == [(n, sent[n - 1]) for n in (1, 3, 4, 5, 6, 7)]
    assert queue.take() == (False, [])


def test_a_reader_who_is_far_behind_is_told_to_load_the_state() -> None:
    queue = EventQueue(most=10)
    for number in range(1, 1001):
        queue.put(number, made("warning", text=str(number)))
        assert len(queue) <= 10
    has_lost, taken = queue.take()
    assert has_lost
    # What is left came after all that was lost.
    assert [number for number, _ in taken] == list(range(1001 - len(taken), 1001))
    assert queue.take() == (False, [])


async def test_wait_ends_with_news_or_in_time_or_at_the_end() -> None:
    queue = EventQueue()
    with anyio.fail_after(5):
        await queue.wait(0.01)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(queue.wait, 60)
            await anyio.wait_all_tasks_blocked()
            queue.put(1, progress(1))
        queue.take()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(queue.wait, 60)
            tasks.start_soon(queue.rest, 60)
            await anyio.wait_all_tasks_blocked()
            queue.close()
        await queue.wait(60)  # and again: nothing more will come
    assert queue.is_closed


async def test_rest_is_not_ended_by_news() -> None:
    changed = Changed()
    changed.add("a")
    with anyio.move_on_after(0.05) as scope:
        await changed.rest(60)
    assert scope.cancelled_caught
    assert changed.take() == {"a"}
    assert changed.take() == set()


def test_a_feed_hands_on_to_all_and_forgets_who_is_gone() -> None:
    feed = Feed(most_readers=2)
    feed.publish(progress(1))  # nobody is there
    with feed.queue() as queue, feed.changes() as changed:
        feed.publish(progress(2))
        feed.publish(made("limits", details={}))
        assert [number for number, _ in queue.take()[1]] == [2, 3]
        assert changed.take() == {"a"}
        with pytest.raises(TooManyReadersError), feed.queue():
            pass
        assert feed.readers == 2
        feed.close()
        assert queue.is_closed
        assert changed.is_closed
    assert feed.readers == 0
    assert feed.events == 3
    with feed.queue() as queue:
        assert queue.is_closed


@pytest.mark.parametrize(
    ("text", "host", "port", "again"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, "127.0.0.1:8080"),
        ("8080", "127.0.0.1", 8080, "127.0.0.1:8080"),
        (":0", "127.0.0.1", 0, "127.0.0.1:0"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("0.0.0.0:65535", "0.0.0.0", 65535, "0.0.0.0:65535"),
        ("host.example.com:1", "host.example.com", 1, "host.example.com:1"),
    ],
)
def test_addresses(text: str, host: str, port: int, again: str) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == again


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no port"),
        ("localhost", "no port"),
        ("localhost:", "no port"),
        ("localhost:http", "no port"),
        ("localhost:65536", "no port"),
        ("localhost:-1", "no port"),
        ("localhost:٣", "no port"),
        ("::1", "not clear where the port begins"),
        ("fe80::1:8080", "not clear where the port begins"),
        ("[::1:8080", "not clear where the port begins"),
    ],
)
def test_wrong_addresses(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_address(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("address", "reason", "hint"),
    [
        (Address("127.0.0.1", 0), "already in use", "ss -ltnp sport = :"),
        # TEST-NET-3: nobody has it.
        (Address("203.0.113.7", 0), "assign", "ip address"),
    ],
)
def test_nobody_can_listen_there(address: Address, reason: str, hint: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        if address.host == "127.0.0.1":
            address = Address(address.host, busy.getsockname()[1])
        with pytest.raises(UsageError, match=reason) as caught:
            listen(address, look_up(address))
    assert str(address) in caught.value.message
    assert hint in (caught.value.hint or "")


def test_unknown_host() -> None:
    with pytest.raises(UsageError, match="the host ‘no such host’ is not known"):
        look_up(Address("no such host", 1))
    with pytest.raises(UsageError, match="is not known: not a name"):
        look_up(Address("x" * 64 + ".example", 1))


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name",
    ["", "localhost.example.com", "127.0.0.1.example.com", "0.0.0.0", "10.0.0.1", "2130706433"],
)
def test_not_loopback(name: str) -> None:
    assert not is_loopback(name)
