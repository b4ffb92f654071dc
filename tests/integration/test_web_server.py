"""--serve over real connections: how it ends, and what goes wrong."""

from __future__ import annotations

import signal
import socket
import sys
import time
from contextlib import ExitStack

import anyio
import pytest

from tests.web_batch import Messages, ask, made, served
from v2v_async.errors import DependencyError, UsageError
from v2v_async.render.batch_state import BatchState
from v2v_async.web.server import serving

STOPS_WITHIN_S = 2.5  # two, and what a busy machine adds


@pytest.mark.parametrize("unread", [False, True])
def test_the_end_comes_within_two_seconds(unread: bool) -> None:
    with ExitStack() as stack:
        with served() as batch:
            batch.plan(3)
            connections = [
                stack.enter_context(batch.stream(path)) for path in ("/api/events", "/api/changes")
            ]
            idle = stack.enter_context(socket.create_connection(("127.0.0.1", batch.port)))
            readers = [Messages(connection) for connection in connections]
            if unread:
                full = Messages(stack.enter_context(batch.stream("/api/events", buffer=4096)))
                for _ in range(100):
                    batch.send(*(made("warning", text="x" * 100_000) for _ in range(2)))
                full.close()
            batch.emit("finished", details={"done": 3, "failed": 0, "cancelled": 0})
            began = time.monotonic()
        assert time.monotonic() - began < STOPS_WITHIN_S
        # Those who read were told all, and that it was the end.
        if not unread:
            readers[0].until(lambda kind, told: told.get("type") == "finished")
            readers[1].until(lambda kind, told: told.get("outcome") == "finished")
            for reader in readers:
                while reader.next():  # the same once more, perhaps, and then the proper end
                    pass
        idle.settimeout(5)
        assert idle.recv(1) == b""
        for reader in readers:
            reader.close()
        with pytest.raises(ConnectionRefusedError):
            ask(batch.port, "/healthz")
    with served(f"127.0.0.1:{batch.port}"):  # at once again, on the same port
        assert ask(batch.port, "/healthz").status == 200


def test_a_busy_port() -> None:
    with served() as batch:
        address = f"127.0.0.1:{batch.port}"
        with pytest.raises(UsageError) as caught, served(address):
            pass
    assert address in caught.value.message
    assert "already in use" in caught.value.message
    assert f"ss -ltnp sport = :{batch.port}" in (caught.value.hint or "")


@pytest.mark.anyio
async def test_cancellation_and_signals() -> None:
    """The block ends as it would without a server, and signals stay the supervisor's."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    state, urls = BatchState(), list[str]()
    block = serving(state, "127.0.0.1:0", token=None, on_listening=urls.append)
    with anyio.CancelScope() as scope:
        async with block as publish:
            publish(made("started"))
            port = int(urls[0].rpartition(":")[2].rstrip("/"))
            answer = await anyio.to_thread.run_sync(ask, port, "/healthz")
            assert answer.status == 200
            assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/healthz")
    with pytest.raises(UsageError, match="^the run’s own$"):  # as it is, not in a group
        async with serving(state, "127.0.0.1:0", token=None, on_listening=urls.append):
            raise UsageError("the run’s own")


def test_nothing_is_written_on_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    with served() as batch:
        for nonsense in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9\r\n\r\n", b"\r\n" * 9, b"GET /"):
            with socket.create_connection(("127.0.0.1", batch.port), timeout=5) as connection:
                connection.sendall(nonsense)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(100)
        batch.state.guests = None  # type: ignore[assignment]
        assert batch.get("/api/state").status == 500  # a mistake of ours reaches nobody else
        assert ask(batch.port, "/healthz").status == 200
    assert capfd.readouterr() == ("", "")


@pytest.mark.anyio
async def test_a_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("v2v_async.web.")]:
        if name != "v2v_async.web.server":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(DependencyError, match="library for it is not installed") as caught:
        async with serving(BatchState(), "127.0.0.1:0", token=None, on_listening=print):
            pass
    assert "v2v-async[web]" in (caught.value.hint or "")
