#!/usr/bin/env python3
"""Six guests of 2 GiB over a slow line: a loop of virt-v2v, ``xargs -P2 virt-v2v``, and a batch.

    .venv/bin/python benchmarks/batch_guests.py [--guests 6] [--gib 2] [--delay-ms 20]

Each guest is one that libguestfs inspects and virt-v2v converts, grown to its size with data in a
second partition that nothing trims. Its disk is on an NBD server that answers each read after
20 ms; virt-v2v reads it by libvirt XML, and so do we. All three make local raw disks. Prints the
times and the two ratios; fails when a promise is not kept: loop / ours >= 1.6, xargs -P2 / ours
>= 1.1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio

from v2v_async.kvm import appliance_environment, probe_kvm

ROOT = Path(__file__).resolve().parent.parent
MIB, GIB = 1 << 20, 1 << 30
PROMISES = {"loop": 1.6, "xargs": 1.1}
_PORT_TRIES = 400


def make_disk(phony: Path, path: Path, size: int, data: int, seed: int) -> None:
    """Grow a phony guest's disk to ``size``, with ``data`` bytes behind its own end.

    The file system of the guest knows nothing of them, so that no conversion trims them: they have
    to be copied, like the files of a real guest.
    """
    subprocess.run(["cp", "--sparse=always", phony, path], check=True)
    noise = random.Random(seed)
    with path.open("r+b") as disk:
        end = disk.seek(0, os.SEEK_END)
        disk.truncate(size)
        room = size - end
        for index in range(data // MIB):
            # Spread over the disk, as files are.
            disk.seek(end + (room // (data // MIB)) * index)
            disk.write(noise.randbytes(MIB))


@contextmanager
def slow_server(disk: Path, socket: Path, delay_ms: int) -> Iterator[str]:
    """Serve a disk over TCP, each read answered after a while; yield the address."""
    import socket as sockets

    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "-t", "64"]
    argv += ["--filter=delay", "file", f"file={disk}", f"delay-read={delay_ms}ms"]
    with subprocess.Popen(argv) as server:
        try:
            for _ in range(_PORT_TRIES):
                try:
                    sockets.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.05)  # a foreign process can only be asked again
            yield str(port)
        finally:
            server.terminate()


def domain(name: str, port: str) -> str:
    """Return a guest's libvirt XML."""
    return f"""<domain type='kvm'><name>{name}</name><memory unit='MiB'>1024</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type></os><devices>
<disk type='network' device='disk'><driver name='qemu' type='raw'/>
<source protocol='nbd'><host name='localhost' port='{port}'/></source>
<target dev='sda' bus='scsi'/></disk></devices></domain>
"""


def main() -> int:
    """Measure, print, and say whether the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=6)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--data-mib", type=int, default=256)
    parser.add_argument("--delay-ms", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=["loop", "xargs", "ours"])
    parser.add_argument("--conversions", type=int, help="of ours at once (default: it chooses)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    phony = Path(
        subprocess.run(
            [ROOT / "scripts" / "phony-guest", "--kind", "linux"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    environment = {**os.environ, **appliance_environment(anyio.run(probe_kvm))}
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bg.", dir="/var/tmp") as name:
        folder = Path(name)
        environment["TMPDIR"] = name
        # Nobody's time is to hold the building of the appliance, which only the first would do.
        environment.setdefault("LIBGUESTFS_CACHEDIR", "/var/tmp")
        environment["V2V_ASYNC_STATE"] = str(folder / "state")
        names = [f"g{number}" for number in range(1, arguments.guests + 1)]
        for number, guest in enumerate(names):
            size = int(arguments.gib * GIB)
            disk = folder / f"{guest}.img"
            make_disk(phony / "system.img", disk, size, arguments.data_mib * MIB, number)
        with ExitStack() as stack:
            for guest in names:
                server = slow_server(folder / f"{guest}.img", folder, arguments.delay_ms)
                port = stack.enter_context(server)
                (folder / f"{guest}.xml").write_text(domain(guest, port))
            digests: dict[str, list[str]] = {}
            for who in arguments.only or ["loop", "xargs", "ours"]:
                out = folder / "out"
                out.mkdir()
                times[who] = measure(who, folder, out, names, environment, arguments.conversions)
                print(f"{who:6} {times[who]:8.1f} s", flush=True)
                digests[who] = [data_digest(out / f"{guest}-sda", phony) for guest in names]
                shutil.rmtree(out)
    if len({tuple(found) for found in digests.values()}) != 1:
        print("the disks differ in what no conversion changes", file=sys.stderr)
        return 1
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seconds": times}, indent=1) + "\n")
    is_kept = True
    for who, wanted in PROMISES.items():
        if who in times and "ours" in times:
            ratio = times[who] / times["ours"]
            is_kept = is_kept and ratio >= wanted
            verdict = "kept" if ratio >= wanted else "BROKEN"
            print(f"{who} / ours: {ratio:.2f} (wanted {wanted}): {verdict}")
    return 0 if is_kept else 1


def measure(
    who: str,
    folder: Path,
    out: Path,
    names: list[str],
    environment: dict[str, str],
    conversions: int | None,
) -> float:
    """Convert all guests; return how many seconds it took."""
    if who == "ours":
        plan = folder / "plan.toml"
        guests = [
            f'[[guests]]\nname = "{name}"\n'
            f'input = {{ type = "libvirtxml", source = "{folder / name}.xml" }}\n'
            for name in names
        ]
        limits = "" if conversions is None else f"[limits]\nconversions = {conversions}\n"
        output = f'[defaults.output]\ntype = "local"\nstorage = "{out}"\n'
        plan.write_text(limits + output + "".join(guests))
        argv = [str(Path(sys.executable).parent / "v2v-async"), "batch", "run", str(plan)]
    else:
        at_once = "1" if who == "loop" else "2"
        argv = ["xargs", "-P", at_once, "-I", "{}", "virt-v2v", "-i", "libvirtxml"]
        argv += [str(folder / "{}.xml"), "-o", "local", "-os", str(out)]
    began = time.monotonic()
    done = subprocess.run(
        argv,
        env=environment,
        input=None if who == "ours" else "\n".join(names),
        capture_output=True,
        text=True,
    )
    seconds = time.monotonic() - began
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
        raise SystemExit(f"{who} failed with {done.returncode}")
    return seconds


def data_digest(path: Path, phony: Path) -> str:
    """Return the digest of what is behind the guest's own file system."""
    with path.open("rb") as disk:
        disk.seek((phony / "system.img").stat().st_size)
        return hashlib.file_digest(disk, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
