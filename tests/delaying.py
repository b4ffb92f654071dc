"""A TCP proxy that delays each direction: the network between here and a distant host.

The delay is added to every byte, not paid once a round trip: what comes while something waits goes
on at its own time, so the bandwidth stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

_CHUNK = 256 * 1024


@contextlib.asynccontextmanager
async def delaying(
    port: int, one_way_s: float, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Forward a loopback port to ``port``, each byte ``one_way_s`` seconds later.

    With ``tls`` clients have to speak that; what is behind does not.
    """

    async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, chunk = await waiting.get()
                # No waiting for something that happens: this is the delay.
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not chunk:
                    sink.close()
                    return
                sink.write(chunk)
                await sink.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while chunk := await source.read(_CHUNK):
                waiting.put_nowait((loop.time() + one_way_s, chunk))
            waiting.put_nowait((loop.time() + one_way_s, b""))
            await delivering
        except ConnectionError:
            pass
        finally:
            delivering.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await delivering
            sink.close()

    async def serve(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        try:
            far_in, far_out = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            client_out.close()
            return
        await asyncio.gather(forward(client_in, far_out), forward(far_in, client_out))

    tasks: set[asyncio.Task[None]] = set()

    def accept(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(client_in, client_out))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
