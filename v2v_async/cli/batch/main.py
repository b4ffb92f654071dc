"""``v2v-async batch COMMAND``: which does what."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Literal

from v2v_async.cli.batch.words import parser
from v2v_async.cli.screen import Sink
from v2v_async.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` says; return the exit status.

    Raises:
        V2VError: it can't be done.
    """
    words = parser().parse_args(argv)
    if words.command is None:
        parser().print_help(sys.stderr)
        raise UsageError("no command", hint="to begin: v2v-async batch init plan.toml")
    match words.command:
        case "init":
            return _init(words)
        case "run":
            from v2v_async.cli.batch.run import run

            return run(words)
        case "resume":
            from v2v_async.cli.batch.run import resume

            return resume(words)
        case "pause" | "cancel":
            from v2v_async.cli.batch.ask import pause_or_cancel

            return pause_or_cancel(words)
        case "status":
            from v2v_async.cli.batch.look import status

            return status(words)
        case _:
            from v2v_async.cli.batch.look import report

            return report(words)


def _init(words: Namespace) -> int:
    from v2v_async.batch.plan.init import init_text, write_init
    from v2v_async.batch.plan.schema import schema_address

    if words.file is None:
        syntax: Literal["toml", "yaml"] = "yaml" if words.yaml else "toml"
        Sink(sys.stdout)(init_text(syntax, f"plan.{syntax}", schema=schema_address()))
        return 0
    is_yaml = words.file.suffix in (".yaml", ".yml")
    if words.yaml and not is_yaml:
        named = shlex.quote(str(words.file.with_suffix(".yaml")))
        raise UsageError(
            f"‘{words.file}’ would be read as TOML, by its name",
            hint=f"v2v-async batch init --yaml {named}",
        )
    if words.file.suffix == ".json":
        raise UsageError(
            f"‘{words.file}’: a plan is TOML or YAML",
            hint="name it plan.toml or plan.yaml",
        )
    write_init(words.file)
    Sink(sys.stdout)(
        f"wrote {words.file}: fill in the first guest, then\n"
        f"  v2v-async batch run {shlex.quote(str(words.file))} --dry-run\n"
    )
    return 0
