"""``v2v-async SUBCOMMAND``, ``virt-v2v-async``, and the same by the name nbdcopy.

What only one subcommand needs is imported when it is asked for: a copy must start fast.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from v2v_async.errors import UsageError, V2VError

if TYPE_CHECKING:
    import argparse

    from v2v_async.cli.getopt import Option
    from v2v_async.events import Reporter

PROG = "v2v-async"

SUBCOMMANDS = {
    "convert": "convert one guest; takes virt-v2v's own command line",
    "clean": "find and remove what dead runs left behind",
    "doctor": "say what is installed, what works and what is missing",
    "completion": "print a completion script for bash or zsh",
    "copy": "copy disks between files, devices and NBD servers; takes nbdcopy's command line",
    "shim": "make a folder in which nbdcopy is this program",
    "batch": "convert many guests in parallel, by a plan",
    "in-place": "convert a guest on its own disks; takes virt-v2v-in-place's command line",
    "inspect": "say what is inside a guest; takes virt-v2v-inspector's command line",
    "warm": "migrate a guest while it runs: what it changes is copied, then it is shut down",
    "bench": "measure copying on this machine, beside nbdcopy and qemu-img",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``v2v-async`` with ``argv`` (default: the process's); return its exit status.

    Called by the name nbdcopy (a link to it), it is nbdcopy.
    """
    if argv is None and os.path.basename(sys.argv[0]) == "nbdcopy":
        return nbdcopy()
    return _guarded(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)), PROG)


def virt_v2v_async(argv: Sequence[str] | None = None) -> int:
    """Run ``virt-v2v-async``, which is ``v2v-async convert`` by a name of its own."""
    from v2v_async.cli.convert import convert

    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: convert(words, "virt-v2v-async"), "virt-v2v-async")


def nbdcopy(argv: Sequence[str] | None = None) -> int:
    """Run as nbdcopy(1)."""

    def work() -> int:
        from v2v_async.cli import copy

        return copy.nbdcopy(list(sys.argv[1:] if argv is None else argv))

    return _guarded(work, "nbdcopy")


def use_safe_encoding() -> None:
    """Let stdout and stderr write what their encoding lacks as ``?`` instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def drop_broken_stdout() -> None:
    """Flush stdout; where its reader is gone, keep the interpreter's own flush from complaining."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stdout.fileno())
            os.close(devnull)


def _guarded(work: Callable[[], int], prog: str) -> int:
    """Return the exit status of ``work`` whatever happens, and leave stdout in peace."""
    use_safe_encoding()
    try:
        return work()
    except BrokenPipeError:
        return 0  # the reader of --help has seen enough
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from v2v_async.cli.failure import explain
        from v2v_async.cli.run import report

        is_verbose = "-v" in sys.argv or "--verbose" in sys.argv
        return report(explain(error, verbose=is_verbose and not isinstance(error, V2VError)), prog)
    finally:
        drop_broken_stdout()
        gc.freeze()  # or the interpreter searches all that is about to go for cycles: 10 ms


def parser() -> argparse.ArgumentParser:
    """Return the parser behind --help and completion: it never parses."""
    import argparse

    from v2v_async.cli import table
    from v2v_async.cli.help import HelpFormatter, completed_by

    made = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} SUBCOMMAND [options]",
        description="Move virtual machines to KVM. "
        f"See {PROG} SUBCOMMAND --help for one subcommand.",
        add_help=False,
        formatter_class=HelpFormatter,
    )
    made.add_argument("--help", action="store_true", help="show this help and stop")
    made.add_argument("--version", action="store_true", help="show the version and stop")
    subparsers = made.add_subparsers(title="subcommands", metavar="SUBCOMMAND")
    for name, text in SUBCOMMANDS.items():
        if name == "convert":
            parents = [table.parser(f"{PROG} convert")]
        elif name == "clean":
            parents = [_clean_parser()]
        elif name == "copy":
            from v2v_async.cli import copy_help

            parents = [copy_help.parser(f"{PROG} copy")]
        elif name == "bench":
            from v2v_async.cli import bench

            parents = [bench.parser()]
        elif name == "batch":
            from v2v_async.cli.batch import words

            parents = [words.parser()]
        elif name == "in-place":
            from v2v_async.cli import in_place

            parents = [in_place.parser()]
        elif name == "inspect":
            from v2v_async.cli import inspect

            parents = [inspect.parser()]
        elif name == "warm":
            from v2v_async.cli import warm

            parents = [warm.parser()]
        else:
            parents = []
        sub = subparsers.add_parser(
            name, help=text, parents=parents, add_help=False, formatter_class=HelpFormatter
        )
        if name == "completion":
            sub.add_argument("shell", choices=["bash", "zsh"])
        elif name == "shim":
            completed_by(sub.add_argument("directory", metavar="DIR"), "directory")
    return made


def _dispatch(argv: list[str]) -> int:
    if not argv:
        parser().print_help(sys.stderr)
        raise UsageError("no subcommand", hint=f"for one guest: {PROG} convert --help")
    name, *rest = argv
    if name in ("--help", "-h", "help"):
        parser().print_help()
        return 0
    if name in ("--version", "-V"):
        from v2v_async import __version__

        print(f"{PROG} {__version__}")
        return 0
    if name not in SUBCOMMANDS:
        raise UsageError(f"unknown subcommand ‘{name}’", hint=_nearest(name))
    if name == "copy":
        from v2v_async.cli import copy

        return copy.copy(rest, f"{PROG} copy")
    if name == "shim":
        from v2v_async.cli import shim

        return shim.main(rest)
    if name == "bench":
        from v2v_async.cli import bench

        return bench.main(rest)
    if name == "batch":
        from v2v_async.cli.batch.main import main as batch

        return batch(rest)
    if name == "in-place":
        from v2v_async.cli.in_place import main as in_place

        return in_place(rest)
    if name == "inspect":
        from v2v_async.cli.inspect import main as inspect

        return inspect(rest)
    if name == "warm":
        from v2v_async.cli.warm import main as warm_main

        return warm_main(rest)
    if name == "convert":
        from v2v_async.cli.convert import convert

        return convert(rest, PROG, usage=f"{PROG} convert")
    if name == "doctor":
        from v2v_async.cli import doctor

        return doctor.main(rest)
    return _completion(rest) if name == "completion" else _clean(rest)


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    if name.startswith("-"):
        return f"options follow a subcommand: {PROG} convert {name} …"
    near = get_close_matches(name, SUBCOMMANDS, n=1)
    return f"did you mean {near[0]}?" if near else "one of " + ", ".join(SUBCOMMANDS)


def _completion(argv: list[str]) -> int:
    from v2v_async.cli.help import completion
    from v2v_async.cli.screen import Sink

    if argv == ["bash"] or argv == ["zsh"]:
        shell = argv[0]
        Sink(sys.stdout)(completion(parser(), "bash" if shell == "bash" else "zsh"))
        return 0
    usage = f"{PROG} completion bash|zsh"
    if argv == ["--help"]:
        Sink(sys.stdout)(
            f"Usage: {usage}\n\nPrint a script that lets the shell complete {PROG}. For bash:\n"
            f"  {PROG} completion bash > ~/.local/share/bash-completion/completions/{PROG}\n"
        )
        return 0
    raise UsageError("completion: no such shell", hint=f"write {usage}")


def _clean_options() -> tuple[Option, ...]:
    from v2v_async.cli import table
    from v2v_async.cli.getopt import Option

    return (
        *(o for o in table.SCREEN if o.name in ("-q", "-v", "--events", "--colours")),
        Option(("--help",), help="show this help and stop"),
    )


def _clean_parser() -> argparse.ArgumentParser:
    from v2v_async.cli import table

    made = table.parser(
        f"{PROG} clean",
        _clean_options(),
        "Stop servers and remove directories that dead runs left. Only what a directory's "
        "state.json proves is theirs is touched.",
        epilog=None,
    )
    positional = made._actions[0]  # argparse has no public way to it
    positional.metavar, positional.help = "DIR", "v2v directories; default: all in $TMPDIR"
    return made


def _clean(argv: list[str]) -> int:
    from pathlib import Path

    from v2v_async.cli import virt_v2v
    from v2v_async.cli.getopt import Given, parse
    from v2v_async.cli.run import run

    words = virt_v2v.Words()
    for item in parse(_clean_options(), argv):
        if isinstance(item, Given):
            words.options.setdefault(item.option.name, []).append(item.value or "")
        else:
            words.words.append(item.text)
    if words.has("--help"):
        _clean_parser().print_help()
        return 0

    async def job(reporter: Reporter) -> object:
        from v2v_async.clean import clean

        return await clean([Path(word) for word in words.words], reporter)

    return run(job, virt_v2v.edge_options(words), PROG)
