"""``v2v-async warm COMMAND``: migrate while the guest runs."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from v2v_async.cli import table, virt_v2v
from v2v_async.cli.convert import refuse, version, warnings_of
from v2v_async.cli.getopt import Option
from v2v_async.cli.run import run
from v2v_async.cli.screen import Sink
from v2v_async.errors import UsageError, V2VError
from v2v_async.events import Reporter
from v2v_async.units import format_lapse, format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from v2v_async.warm.start import SyncOptions
    from v2v_async.warm.state import WarmState

PROG = "v2v-async warm"
COMMANDS = {
    "start": "copy the guest's disks while it runs, for the first time",
    "sync": "copy what has changed since the last pass",
    "cutover": "the guest being off: copy the last of it, convert on the target, make the guest",
    "status": "say how far it is, and what a cutover now would cost",
    "abort": "remove all that the migration made, on both sides",
}

_STATE = Option(
    ("--state",),
    metavar="DIR",
    argument="required",
    once=True,
    files="directory",
    help="the migration's folder: start makes it, and it goes with the last step",
)
_START = (
    Option(("--socket-dir",), metavar="DIR", argument="required", once=True, files="directory",
           help="where the guest's qemu may make a socket; default: found out"),
    Option(("--bitmap",), metavar="NAME", argument="required", once=True,
           help="a dirty bitmap that the NBD exports of -i disk tell, older than this start"),
)  # fmt: skip
_SYNC = (
    Option(("--every",), metavar="TIME", argument="required", once=True,
           help="again and again, so much time apart: 10m"),
    Option(("--until-below",), metavar="SIZE|TIME", argument="required", once=True,
           help="until a pass finds less than SIZE (1G) changed, or a cutover would take less "
           "than TIME (30s)"),
)  # fmt: skip
_CUTOVER = (
    Option(("--shutdown",), metavar="TIME", argument="optional", once=True,
           help="ask the guest to shut down, and wait at most so long (default: 5m)"),
)  # fmt: skip
_STATUS = (Option(("--json",), help="as JSON"),)
_GENERAL = tuple(option for option in table.GENERAL if option.name != "--print-source")
_OURS = (_STATE, *_START, *_SYNC, *_CUTOVER, *_STATUS)
_SHUTDOWN_S = 300.0

# A pass copies what has changed, by itself.
_COPY = tuple(
    option
    for option in table.COPY
    if option.name not in ("--copier", "--overlap", "--overlap-waste")
)
_TAKEN: dict[str, tuple[Option, ...]] = {
    "start": (*table.INPUT, *table.OUTPUT, *_COPY, *table.SCREEN, _STATE, *_START),
    "sync": (*_COPY, *table.SCREEN, _STATE, *_SYNC),
    "cutover": (
        *_COPY, *table.CONVERSION, *table.NETWORK, *table.SCREEN, _STATE, *_CUTOVER,
    ),
    "status": (_STATE, *_STATUS),
    "abort": (*table.SCREEN, _STATE),
}  # fmt: skip

_FOR_START = {option.name for option in (*table.INPUT, *table.OUTPUT)}
_FOR_CUTOVER = {option.name for option in (*table.CONVERSION, *table.NETWORK, *table.CUSTOMIZE)}


def parser(command: str | None = None) -> ArgumentParser:
    """Return the parser behind --help and completion: it never parses."""
    if command is None:
        shown: dict[str, Option] = {}
        for taken in (*_TAKEN.values(), _GENERAL):
            shown |= {option.name: option for option in taken}
        listed = "; ".join(f"{name}: {text}" for name, text in COMMANDS.items())
        return table.parser(
            PROG,
            tuple(shown.values()),
            "Migrate a guest while it runs: its disks are copied, then again and again what it "
            f"has changed, until it is shut down for the last of it. {listed}.",
            f"{PROG} COMMAND --help shows what each takes.",
            usage=f"{PROG} COMMAND --state DIR [options] [GUEST …]",
        )
    text = COMMANDS[command]
    return table.parser(
        f"{PROG} {command}",
        (*_TAKEN[command], *_GENERAL),
        f"{text[0].upper()}{text[1:]}.",
        None,
        usage=f"{PROG} {command} --state DIR [options]{' GUEST …' if command == 'start' else ''}",
        **({} if command == "start" else {"words": None}),
    )


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` says; return the exit status."""
    command = next((word for word in argv if word in COMMANDS), None)
    if command is None or argv[0] != command:
        if argv and argv[0] in ("--help", "-h"):
            parser().print_help()
            return 0
        named = f"no command ‘{argv[0]}’" if argv else "no command"
        raise UsageError(f"{PROG}: {named}", hint=f"it has {', '.join(COMMANDS)}")
    words: virt_v2v.Words | None = None
    try:
        words = virt_v2v.read(argv[1:], _OURS)
        if words.wants_help:
            parser(command).print_help()
            return 0
        if words.wants_version:
            Sink(sys.stdout)(version("v2v-async"))
            return 0
        _refuse_others(words, command)
        virt_v2v.refuse_not_built(words)
        return _run(command, words)
    except V2VError as error:
        return refuse(error, words, "v2v-async")


def _refuse_others(words: virt_v2v.Words, command: str) -> None:
    """Refuse options of other commands, and words where there are none.

    Raises:
        UsageError
    """
    taken = {option.name for option in _TAKEN[command]}
    given = [*words.options, *(["customize"] if words.customize else [])]
    for name in given:
        if name in taken or (name == "customize" and command == "cutover"):
            continue
        if name == "customize":
            name = words.customize[0]
        hint = "leave it out"
        if command == "start" and name in _FOR_CUTOVER:
            hint = "what is for the conversion is given to v2v-async warm cutover"
        elif name in _FOR_START:
            hint = "the source and the target were given to v2v-async warm start"
        raise UsageError(f"warm {command} takes no {name}", hint=hint)
    if command != "start" and words.words:
        raise UsageError(f"warm {command}: ‘{words.words[0]}’ is too much", hint="--state DIR")
    if not words.last("--state"):
        raise UsageError(f"warm {command}: no folder was named", hint="add --state DIR")
    if words.has("-op"):
        raise UsageError(
            "warm start takes no password for the target", hint="use a connection that needs none"
        )


def _run(command: str, words: virt_v2v.Words) -> int:
    path = Path(words.last("--state") or "")
    edge = virt_v2v.edge_options(words)
    copy = virt_v2v.copy_options(words)
    warnings = list(words.warnings)
    if command == "status":
        return _status(path, as_json=words.has("--json"))

    async def job(reporter: Reporter) -> object:
        # Late: they bring in libnbd and pydantic's schemas.
        from v2v_async.warm import cutover, start

        match command:
            case "start":
                return await start.start(started, path, reporter)
            case "sync":
                return await start.sync(synced, path, reporter)
            case "cutover":
                return await cutover.cutover(options, path, reporter)
            case _:
                await start.abort(path, reporter)
                return None

    if command == "start":
        from v2v_async.warm.start import StartOptions

        folder, password = words.last("--socket-dir"), words.last("-ip")
        started = StartOptions(
            virt_v2v.input_options(words),
            virt_v2v.output_options(words),
            copy,
            None if folder is None else Path(folder),
            words.last("--bitmap"),
        )
        if started.input.password is not None and password is not None:
            started = replace(started, password_file=Path(password))
        elif started.input.password is not None:
            raise UsageError(
                "warm start needs -ip FILE: the passes to come read the password again"
            )
        warnings = warnings_of(words, started.input)
    elif command == "sync":
        synced = _sync_options(words)
    elif command == "cutover":
        from v2v_async.warm.cutover import CutoverOptions

        convert = virt_v2v.convert_options(words)
        options = CutoverOptions(convert, copy, _shutdown(words))
    return run(job, edge, "v2v-async", warnings=warnings)


def _sync_options(words: virt_v2v.Words) -> SyncOptions:
    from v2v_async.warm.start import SyncOptions

    every, below = words.last("--every"), words.last("--until-below")
    size: int | None = None
    time_s: float | None = None
    if below is not None:
        # A time first: 5m is five minutes, and 5M is five MiB.
        try:
            time_s = parse_duration(below)
        except ValueError:
            size = _size("--until-below", below)
    every_s = None if every is None else _duration("--every", every, "a time such as 10m")
    return SyncOptions(virt_v2v.copy_options(words), every_s, size, time_s)


def _shutdown(words: virt_v2v.Words) -> float | None:
    if not words.has("--shutdown"):
        return None
    text = words.last("--shutdown")
    return _duration("--shutdown", text, "a time such as 5m") if text else _SHUTDOWN_S


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise UsageError(
            f"{option}: ‘{text}’ is neither a size such as 1G nor a time such as 30s"
        ) from None


def _duration(option: str, text: str, wanted: str) -> float:
    try:
        return parse_duration(text)
    except ValueError:
        raise UsageError(f"{option}: ‘{text}’ is not {wanted}") from None


def _status(path: Path, *, as_json: bool) -> int:
    from v2v_async.warm.state import WarmFolder
    from v2v_async.warm.status import look

    state = look(WarmFolder(path))
    found = state.forecast
    if as_json:
        Sink(sys.stdout)(state.model_dump_json(indent=1) + "\n")
        return 0
    from v2v_async.warm.start import told as in_words

    lines = [_first_line(state, is_busy=state.is_busy)]
    for each in state.passes[-10:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.began))
        what = "all of it" if each.is_all else f"{format_size(each.changed)} changed"
        lines.append(
            f"  pass {each.number}  {when}  {what}, {format_size(each.copied)} copied in "
            f"{format_lapse(each.duration_s)}"
        )
    if found is not None:
        lines.append(in_words(found))
        lines += [
            f"  disk {disk.index}: {format_size(disk.dirty_rate)}/s, "
            f"{format_size(disk.left)} left, "
            f"{format_lapse(disk.downtime_s)} of it"
            for disk in found.disks
        ]
    elif state.is_whole:
        lines.append("what a cutover would cost is known after the next sync")
    Sink(sys.stdout)("\n".join(lines) + "\n")
    return 0


def _first_line(state: WarmState, *, is_busy: bool) -> str:
    if is_busy:
        now = "a command is at it"
    elif state.phase == "converted":
        now = "converted; cutover makes the guest"
    elif state.current is not None:
        now = f"pass {state.current.number} died: the next one repeats it"
    elif state.phase == "copied":
        now = "copied while it was off; cutover converts it"
    else:
        now = "in sync as of the last pass"
    how = "by digests" if state.method == "digests" else "the source tells what changes"
    return f"{state.guest}: {len(state.disks)} disks, {how}; {now}"
