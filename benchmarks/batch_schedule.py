#!/usr/bin/env python3
"""Simulate batches of many guests: how near the schedule is to the shortest time that could be.

    .venv/bin/python benchmarks/batch_schedule.py [--guests 1000] [--seeds 12]

Each batch has its own hosts, targets and limits, made from its seed. The bound is the time for
which the tightest resource is busy, or the longest guest; no schedule is shorter. Decisions are
timed in processor time, since other work on the machine is not theirs. The status is 1 where a
batch takes over 1.1 times its bound, or its median decision more than 1 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.batch_simulation import made_batch, simulate

_MOST_OF_BOUND = 1.1
_MOST_MS = 1.0  # of the median decision; a few look at every guest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, default=1000, metavar="N")
    parser.add_argument("--seeds", type=int, default=12, metavar="N")
    options = parser.parse_args()
    print("seed  makespan/bound  decisions  ms each  ms median  ms at most")
    worst = slowest_ms = 0.0
    for seed in range(options.seeds):
        batch = made_batch(seed, options.guests)
        result = simulate(batch)
        median_ms = 1000 * statistics.median(result.decisions_s)
        worst = max(worst, result.makespan_s / batch.bound_s)
        slowest_ms = max(slowest_ms, median_ms)
        print(
            f"{seed:4}  {result.makespan_s / batch.bound_s:14.3f}  {len(result.decisions_s):9}  "
            f"{1000 * sum(result.decisions_s) / len(result.decisions_s):7.3f}  "
            f"{median_ms:9.3f}  "
            f"{1000 * max(result.decisions_s):10.2f}"
        )
    print(f"longest: {worst:.3f} of its bound (wanted: at most {_MOST_OF_BOUND})")
    print(f"slowest: {slowest_ms:.3f} ms for a median decision (wanted: at most {_MOST_MS:.0f})")
    return 0 if worst <= _MOST_OF_BOUND and slowest_ms <= _MOST_MS else 1


if __name__ == "__main__":
    sys.exit(main())
