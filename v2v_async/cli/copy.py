"""``v2v-async copy``, and the same engine as a program named nbdcopy.

::

    v2v-async copy   our screen, our options too, flushes, exit status 2 for a wrong command line
    nbdcopy          silent but for errors, nbdcopy's options, flushes with --flush, exit status 1

Start-up counts: a virt-v2v runs this once for each disk. So pydantic, lxml and (but for a terminal)
rich are never imported here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v2v_async.cli import copy_words
from v2v_async.cli.copy_ends import Pair
from v2v_async.cli.copy_words import CopyWords, writes_stdout
from v2v_async.cli.getopt import Option
from v2v_async.errors import UsageError, V2VError
from v2v_async.options import CopyOptions
from v2v_async.render.nbdcopy import Progress, ProgressBar, ProgressLines

if TYPE_CHECKING:
    from v2v_async.cli.virt_v2v import EdgeOptions
    from v2v_async.events import Reporter

EVENTS_VARIABLE = "V2V_ASYNC_EVENTS"
"""Names a file to which the program named nbdcopy adds its events: its caller knows no --events."""

Job = Callable[["Reporter"], Awaitable[object]]


def copy(argv: Sequence[str], prog: str) -> int:
    """Do what ``v2v-async copy ARGV`` says; return the exit status."""
    words = copy_words.read(argv, is_nbdcopy=False)
    if words.answer is not None:
        _answer(words, prog, copy_words.COPY)
        return 0
    options = copy_words.options(words, is_nbdcopy=False)
    disks = copy_words.disks(words, is_nbdcopy=False)
    edge = _edge(words, disks)
    _check_outputs(words)
    progress = _progress(words)

    from v2v_async.cli.run import run

    return run(
        _job(disks, options, progress),
        edge,
        prog,
        # Nothing may share stdout with a disk, and a bar is screen enough.
        is_plain=writes_stdout(disks) or words.progress == "bar",
        after=lambda results: _print_digests(results, disks, words),
    )


def nbdcopy(argv: Sequence[str]) -> int:
    """Be nbdcopy(1); return its exit status."""
    try:
        words = copy_words.read(argv, is_nbdcopy=True)
        if words.answer is not None:
            _answer(words, "nbdcopy", copy_words.NBDCOPY)
            return 0
        options = copy_words.options(words, is_nbdcopy=True)
        disks = copy_words.disks(words, is_nbdcopy=True)
        return _run_silently(words, disks, options, _progress(words))
    except V2VError as error:
        return _complain(error, verbose=False)


def _run_silently(
    words: CopyWords, disks: Sequence[Pair], options: CopyOptions, progress: Progress | None
) -> int:
    """Copy without a screen; only errors are told, on stderr."""
    from v2v_async.cli.run import run_loop
    from v2v_async.events import Reporter
    from v2v_async.render.broadcast import Broadcast

    verbose = words.has("-v")
    if verbose:
        os.environ.setdefault("LIBNBD_DEBUG", "1")  # as nbdcopy -v: libnbd(3), "DEBUGGING"
    with Broadcast(_silent_renderers(verbose)) as broadcast:
        reporter = Reporter(broadcast, f"{os.getpid():x}")
        reporter.emit("started", details={"program": "nbdcopy", "arguments": _shown(disks)})
        ending = run_loop(_job(disks, options, progress), reporter)
        if ending.is_done:
            reporter.emit("finished")
        elif ending.error is not None:
            reporter.emit("failed", str(ending.error))
        else:
            reporter.emit("cancelled")
    if ending.error is not None:
        return _complain(ending.error, verbose=verbose)
    if not ending.is_done:
        return 128 + (ending.signal or 0)
    _print_digests(ending.result, disks, words)
    return 0


def _silent_renderers(verbose: bool) -> list[Any]:
    renderers: list[Any] = []
    if verbose:
        from v2v_async.render.plain import Plain

        renderers.append(Plain(_to_stderr, prog="nbdcopy", verbose=True))
    if path := os.environ.get(EVENTS_VARIABLE):
        from v2v_async.render.jsonl import JsonLines

        # Added to, not replaced: one virt-v2v runs several nbdcopy. The log must not fail a copy.
        with suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            renderers.append(JsonLines(fd))
    return renderers


def _complain(error: BaseException, *, verbose: bool) -> int:
    """Tell ``error`` as nbdcopy does: a line beginning with its name. Return its exit status."""
    from v2v_async.cli.failure import explain
    from v2v_async.errors import leaves

    for leaf in leaves(error):
        failure = explain(leaf, verbose=verbose)
        _to_stderr(f"nbdcopy: {failure.one_line()}\n")
        if failure.hint:
            _to_stderr(f"nbdcopy: {failure.hint}\n")
        if verbose:
            _to_stderr("".join(f"  {label}: {text}\n" for label, text in failure.lines))
    return 1


def _job(disks: Sequence[Pair], options: CopyOptions, progress: Progress | None) -> Job:
    """Return the work: copy ``disks``, as the step that screens know as ``copy``."""

    async def job(reporter: Reporter) -> object:
        from v2v_async.copy.schedule import CopyJob, copy_disks

        if progress is not None:
            reporter = reporter.tee(progress)
        step = reporter.for_step("copy")
        step.emit("started")
        is_done = False
        try:
            jobs = [CopyJob(n, source, target) for n, (source, target) in enumerate(disks, 1)]
            results = await copy_disks(jobs, step, options)
            is_done = True
        except Exception:
            step.emit("failed")
            raise
        finally:
            if progress is not None:
                progress.finish(is_done=is_done)
        step.emit("finished")
        return results

    return job


def _progress(words: CopyWords) -> Progress | None:
    """Return what shows progress; call it early.

    A descriptor that is closed now may be a disk's in a moment: nothing must be written to it then.
    """
    if words.progress == "bar":
        return ProgressBar(_to_stderr)
    if words.progress is None or _closed(words.progress):
        return None
    return ProgressLines(words.progress)


def _closed(fd: int) -> str | None:
    """Return why ``fd`` can't be written, None where it is open."""
    try:
        os.fstat(fd)
    except OSError as error:
        return error.strerror
    return None


def _to_stderr(text: str) -> None:
    # A reader that went away must not end a copy.
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _edge(words: CopyWords, disks: Sequence[Pair]) -> EdgeOptions:
    """Return what the screen needs, refusing what would mix with a disk on stdout."""
    from v2v_async.cli import values
    from v2v_async.cli.virt_v2v import EdgeOptions

    events = words.options.get("--events")
    edge = EdgeOptions(
        quiet=words.has("-q") or words.progress == "bar",
        verbose=words.has("-v"),
        colours=words.has("--colours"),
        machine_readable=values.machine_readable_target(words.options["--machine-readable"])
        if words.has("--machine-readable")
        else None,
        events=None if events is None else values.events_target(events),
        # It makes the screen leave stdout alone.
        keeps_stdout=writes_stdout(disks),
    )
    if writes_stdout(disks):
        if edge.machine_readable is not None:
            raise UsageError(
                "--machine-readable writes to stdout, which is the copy's target",
                hint="use --events=FILE or --progress=FD",
            )
        if edge.events is not None and edge.events.fd == 1:
            raise UsageError("--events: stdout is the copy's target", hint="write --events=FILE")
    return edge


def _check_outputs(words: CopyWords) -> None:
    """Refuse now what could be found out only after hours of copying."""
    if isinstance(words.progress, int) and (reason := _closed(words.progress)):
        raise UsageError(
            f"--progress={words.progress}: {reason}",
            hint="open the descriptor in the calling program",
        )
    name = _digest_file(words)
    if name is not None and not (folder := Path(os.path.realpath(name)).parent).is_dir():
        raise UsageError(f"--digest-file: there is no ‘{folder}’", hint="name a file in a folder")


def _digest_file(words: CopyWords) -> str | None:
    return words.options.get("--digest-file") or words.options.get("--blkhash-file")


def _print_digests(results: object, disks: Sequence[Pair], words: CopyWords) -> None:
    """Print what --digest asked for: where it was asked for, else on stdout where that is free.

    Raises:
        V2VError: it can't be written; the hint has it.
    """
    assert isinstance(results, list)
    text = digest_lines([(str(d[1]), r.digest) for d, r in zip(disks, results, strict=True)])
    if not text:
        return
    name = _digest_file(words)
    try:
        if name:
            Path(name).write_text(text)
        elif writes_stdout(disks):
            _to_stderr(text)
        elif sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()
    except OSError as error:
        # Reading the disks again would take as long as the copy.
        raise V2VError(
            f"the digest can't be written to {name or 'stdout'}: {error.strerror}",
            hint=f"the copy is done; it is:\n{text}",
        ) from None


def digest_lines(digests: Sequence[tuple[str, str | None]]) -> str:
    """Return what is printed of (target, digest): the digest alone for one disk, as nbdcopy."""
    from v2v_async.render.text import clean

    known = [(clean(name), digest) for name, digest in digests if digest is not None]
    if len(digests) == 1:
        return "".join(f"{digest}\n" for _, digest in known)
    return "".join(f"{digest}  {name}\n" for name, digest in known)


def _shown(disks: Sequence[Pair]) -> list[str]:
    return [str(end) for pair in disks for end in pair]


def _answer(words: CopyWords, prog: str, options: Sequence[Option]) -> None:
    """Print what --help, --version, --long-options or --short-options ask for."""
    if words.answer == "--help":
        from v2v_async.cli import copy_help

        if prog == "nbdcopy":
            sys.stdout.write(copy_help.NBDCOPY)
        else:
            copy_help.parser(prog).print_help()
    elif words.answer == "-V":
        sys.stdout.write(_version(prog))
    else:
        start = 2 if words.answer == "--long-options" else 1
        names = (
            name
            for option in options
            for name in option.names
            if len(name) - len(name.lstrip("-")) == start and option.name not in _COMPLETION
        )
        sys.stdout.write("".join(f"{name}\n" for name in sorted(names, key=str.casefold)))


_COMPLETION = ("--long-options", "--short-options")  # they do not list themselves


def _version(prog: str) -> str:
    from v2v_async import __version__

    if prog != "nbdcopy":
        return f"{prog} {__version__}\n"
    from v2v_async.handle import version  # programs compare it: libnbd says what nbdcopy can

    return f"nbdcopy {version()}\nlibnbd {version()}\nv2v-async {__version__}\n"
