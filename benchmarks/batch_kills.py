#!/usr/bin/env python3
"""Kill the supervisor of a batch at random moments, resume it each time, and look at the result.

    .venv/bin/python benchmarks/batch_kills.py [--kills 20] [--guests 4] [--mib 128] [--seed 1]

Conversions are replayed. Every target must equal its source as converted, no process and no file
may be left, and no more than 1.2 bytes may be read from the sources for each byte of data. A run
that ends before it was killed so often fails too: it proves less than was asked for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fault.test_batch_kill import Outcome, run_with_kills

MIB = 1 << 20
PROMISE = 1.2


def main() -> int:
    """Measure, print, and say whether the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--guests", type=int, default=4)
    parser.add_argument("--mib", type=int, default=128, help="of each disk; a guest has two")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bk.", dir="/var/tmp") as folder:
        outcome = run_with_kills(
            Path(folder),
            guests=arguments.guests,
            size=arguments.mib * MIB,
            kills=arguments.kills,
            seed=arguments.seed,
        )
    return told(outcome, wanted=arguments.kills, seed=arguments.seed)


def told(outcome: Outcome, *, wanted: int, seed: int) -> int:
    """Print what came of it; return the exit status."""
    is_read, is_killed = outcome.read_ratio <= PROMISE, outcome.kills >= wanted
    print(f"seed {seed}: {outcome.kills} kills, all targets right, nothing left")
    verdict = "kept" if is_read else "BROKEN"
    print(f"bytes read by bytes of data: {outcome.read_ratio:.3f} (wanted {PROMISE}): {verdict}")
    if not is_killed:
        print(
            f"the run ended after {outcome.kills} of {wanted} kills: give it more to copy, with "
            "--mib or --guests",
            file=sys.stderr,
        )
    return 0 if is_read and is_killed else 1


if __name__ == "__main__":
    sys.exit(main())
