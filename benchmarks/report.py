"""Paste a measurement into the documentation: the table into two pages, the plot beside them.

    v2v-async bench --json benchmarks/results.json
    .venv/bin/python benchmarks/report.py [benchmarks/results.json]

Writes between the markers of benchmarks/README.md and docs/benchmarks.md, and docs/benchmarks.svg.
``--check`` writes nothing and exits with 1 where these are not what the file says.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from v2v_async.bench import plot, report
from v2v_async.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "benchmarks/README.md", ROOT / "docs/benchmarks.md")
PLOT = ROOT / "docs/benchmarks.svg"
_BEGIN, _END = "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->"


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="?", default=ROOT / "benchmarks/results.json")
    parser.add_argument("--check", action="store_true", help="write nothing, say what is old")
    arguments = parser.parse_args()
    try:
        made = report.read(arguments.json)
    except UsageError as error:
        raise SystemExit(str(error)) from None
    wanted = {page: pasted(page.read_text("utf-8"), report.markdown(made)) for page in PAGES}
    wanted[PLOT] = plot.svg(made)
    old = [p for p, text in wanted.items() if not p.exists() or p.read_text("utf-8") != text]
    for path in old:
        print(f"{'old' if arguments.check else 'written'}: {path.relative_to(ROOT)}")
        if not arguments.check:
            path.write_text(wanted[path], "utf-8")
    return 1 if arguments.check and old else 0


def pasted(page: str, text: str) -> str:
    """Return ``page`` with ``text`` between its markers."""
    pattern = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"no ‘{_BEGIN}’ … ‘{_END}’ in the page")
    return pattern.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", page, count=1)


if __name__ == "__main__":
    sys.exit(main())
