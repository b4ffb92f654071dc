"""How long a whole conversion takes, beside virt-v2v on the same guest in the same run.

    .venv/bin/python benchmarks/conversion_time.py [--rounds N] [--guest DIR] [--keep DIR]

Both convert the sample guest (three disks) to local raw disks, in turn, so that both see the same
noise. Fails when the median of ours is over the median of virt-v2v's plus 2 s: there must be one
start of the appliance, not two, and the supervisor may cost next to nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

from v2v_async.kvm import appliance_environment, probe_kvm

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_S = 2.0


def main() -> int:
    """Measure, print a table, and say whether the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guest", type=Path, help="folder of disks (default: the sample guest)")
    parser.add_argument("--keep", type=Path, help="keep the last outputs there: ours/ and theirs/")
    arguments = parser.parse_args()
    guest = arguments.guest or Path(
        subprocess.run(
            [ROOT / "scripts" / "sample-guest"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()
    )
    # A KVM that does not work is found out once per boot, by us; virt-v2v would hang with it.
    environment = {**os.environ, **appliance_environment(anyio.run(probe_kvm))}
    commands = {
        "virt-v2v": ["virt-v2v"],
        "v2v-async": [str(Path(sys.executable).parent / "virt-v2v-async")],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        # virt-v2v 2.2 refuses disks of different formats (-i disk); so both get raw ones.
        data1 = Path(folder) / "data1.img"
        convert = ["qemu-img", "convert", "-O", "raw", str(guest / "data1.qcow2"), str(data1)]
        subprocess.run(convert, check=True)
        disks = [str(guest / "system.img"), str(data1), str(guest / "data2.img")]
        for round_ in range(arguments.rounds):
            order = list(commands)
            for name in order if round_ % 2 == 0 else reversed(order):
                out = Path(folder) / name
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                argv = [*commands[name], "-i", "disk", *disks, "-o", "local", "-os", str(out)]
                argv += ["-on", "sample"]
                began = time.monotonic()
                done = subprocess.run(argv, env=environment, capture_output=True, text=True)
                times[name].append(time.monotonic() - began)
                if done.returncode:
                    print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
                    print(f"{name} failed with {done.returncode}", file=sys.stderr)
                    return 1
                print(f"round {round_ + 1}: {name:10} {times[name][-1]:7.1f} s", flush=True)
        if arguments.keep is not None:
            shutil.copytree(Path(folder) / "v2v-async", arguments.keep / "ours")
            shutil.copytree(Path(folder) / "virt-v2v", arguments.keep / "theirs")
    ours, theirs = (statistics.median(times[name]) for name in ("v2v-async", "virt-v2v"))
    verdict = "kept" if ours <= theirs + ALLOWED_S else "BROKEN"
    print(f"median: v2v-async {ours:.1f} s, virt-v2v {theirs:.1f} s, {ours / theirs:.2f} times")
    print(f"no longer than virt-v2v plus {ALLOWED_S:.0f} s: {verdict}")
    return 0 if verdict == "kept" else 1


if __name__ == "__main__":
    sys.exit(main())
