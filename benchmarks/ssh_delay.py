#!/usr/bin/env python3
"""Measure nbdkit's ssh plugin over a slow line: connections in one process, and several processes.

    .venv/bin/python benchmarks/ssh_delay.py [--delay-ms 10] [--mib 16]

Starts an sshd on a loopback port and a proxy before it that delays each direction. docs/
sources-ssh.md has the figures of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbd

from tests.delaying import delaying
from tests.sshd import Sshd, running_sshd

MIB = 1 << 20


def log_in(socket: Path) -> nbd.NBD:
    """Return a connection; behind it nbdkit logs in."""
    handle = nbd.NBD()
    handle.connect_unix(str(socket))
    return handle


def read(handle: nbd.NBD, offset: int, length: int, request: int, in_flight: int) -> None:
    """Read a range over one connection."""
    flying: set[int] = set()
    end = offset + length
    while offset < end or flying:
        while offset < end and len(flying) < in_flight:
            count = min(request, end - offset)
            flying.add(handle.aio_pread(nbd.Buffer(count), offset))
            offset += count
        handle.poll(-1)
        for cookie in list(flying):
            if handle.aio_command_completed(cookie):
                flying.remove(cookie)
    handle.shutdown()


def measure(
    server: Sshd,
    port: int,
    disk: Path,
    *,
    processes: int,
    connections: int,
    request: int,
    filters: tuple[str, ...],
) -> float:
    """Return the seconds of reading the whole disk once."""
    sockets = [disk.parent / f"s{n}" for n in range(processes)]
    servers = []
    for socket in sockets:
        argv = ["nbdkit", "-f", "-r", "-U", str(socket), *(f"--filter={f}" for f in filters)]
        argv += ["ssh", "host=127.0.0.1", f"port={port}", f"path={disk}", "config="]
        argv += [f"identity={server.identity}", f"known-hosts={server.folder}/delayed_hosts"]
        servers.append(subprocess.Popen(argv))
    try:
        for socket in sockets:
            while not socket.exists():
                time.sleep(0.01)  # nbdkit in the foreground tells in no other way that it is ready
        size = disk.stat().st_size
        share = size // connections
        with ThreadPoolExecutor(connections) as pool:
            # The logins are not what is measured.
            handles = list(pool.map(lambda n: log_in(sockets[n % processes]), range(connections)))
            start = time.monotonic()
            jobs = [
                pool.submit(read, handles[n], n * share, share, request, 4)
                for n in range(connections)
            ]
            for job in jobs:
                job.result()
            return time.monotonic() - start
    finally:
        for process in servers:
            process.terminate()
            process.wait()
        for socket in sockets:
            socket.unlink(missing_ok=True)


async def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="nbdkit ssh over a line with a delay")
    parser.add_argument("--delay-ms", type=float, default=10, help="one way (default 10)")
    parser.add_argument("--mib", type=int, default=16, help="size of the disk (default 16)")
    words = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ssh-delay.", dir="/var/tmp"))
    try:
        disk = folder / "disk"
        disk.write_bytes(b"v2v-async" * (words.mib * MIB // 9) + bytes(words.mib * MIB % 9))
        with running_sshd(folder) as server:
            async with delaying(server.port, words.delay_ms / 1000) as port:
                known = server.known_hosts.read_text().replace(f":{server.port} ", f":{port} ")
                (server.folder / "delayed_hosts").write_text(known)
                print("connections  processes  request  filters    seconds   MiB/s")
                for connections, processes, request, filters in (
                    (1, 1, 256, ()),
                    (1, 1, 1024, ()),
                    (1, 1, 4096, ()),
                    (4, 1, 1024, ()),
                    (4, 4, 1024, ()),
                    (8, 1, 256, ()),
                    (8, 1, 1024, ()),
                    (8, 1, 1024, ("retry",)),
                    (8, 1, 1024, ("readahead",)),
                    (8, 8, 1024, ()),
                    (16, 1, 1024, ()),
                    (16, 4, 1024, ()),
                ):
                    took = await asyncio.to_thread(
                        measure,
                        server,
                        port,
                        disk,
                        processes=processes,
                        connections=connections,
                        request=request * 1024,
                        filters=filters,
                    )
                    print(
                        f"{connections:11}  {processes:9}  {request:4} KiB  "
                        f"{','.join(filters) or '-':9} {took:8.2f}  {words.mib / took:6.1f}",
                        flush=True,
                    )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(main())
