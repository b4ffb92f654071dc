"""The ``helper-v2v-*`` programs: one step each, on an existing v2v directory.

Each takes ``--v2vdir DIR`` and the options of the main command. Options of other steps are
accepted and not looked at, so that a script can hand ``"$@"`` to all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from v2v_async.cli import modes, table, virt_v2v
from v2v_async.cli.convert import version
from v2v_async.cli.getopt import Option
from v2v_async.cli.main import _guarded
from v2v_async.cli.run import run
from v2v_async.cli.screen import Sink
from v2v_async.cli.virt_v2v import Words
from v2v_async.errors import UsageError
from v2v_async.events import Reporter

_V2VDIR = Option(
    ("--v2vdir",),
    metavar="DIR",
    help="the directory where the steps meet",
    group="general",
    argument="required",
    once=True,
    files="directory",
)
Entry = Callable[[Sequence[str] | None], int]
"""A console script."""
Step = Callable[[Path, Reporter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Helper:
    """One program: what it shows, and how it makes its step of the words it is given."""

    prog: str
    summary: str
    options: tuple[Option, ...]
    step: Callable[[Words], Step]
    phases: tuple[str, ...] = ()


def _output_mode(words: Words, wanted: str) -> None:
    """Make ``wanted`` the mode where none was given; refuse another helper's."""
    text = words.last("-o")
    if text is None:
        words.options["-o"] = [wanted]
    elif modes.output_mode(text).name != wanted:
        raise UsageError(
            f"this helper is for -o {wanted}, not -o {text}",
            hint=f"run helper-v2v-output-{modes.output_mode(text).name} where there is one",
        )


_INPUT_WORDS = {
    "vcenter": (("-i", "libvirt"),),
    "vddk": (("-i", "libvirt"), ("-it", "vddk")),
    "xen-ssh": (("-i", "libvirt"),),
}
"""What an input's helper takes as given, where it is not the -i of the same name."""


def _input(wanted: str) -> Callable[[Words], Step]:
    def make(words: Words) -> Step:
        for option, value in _INPUT_WORDS.get(wanted, (("-i", wanted),)):
            words.options.setdefault(option, [value])
        options = virt_v2v.input_options(words, wanted)

        async def step(v2vdir: Path, reporter: Reporter) -> None:
            from v2v_async import steps

            await steps.input_step(v2vdir, options, reporter)

        return step

    return make


def _convert(words: Words) -> Step:
    options = virt_v2v.convert_options(words)
    name = words.last("-on")

    async def step(v2vdir: Path, reporter: Reporter) -> None:
        from v2v_async import steps

        await steps.convert_step(v2vdir, options, name, reporter)

    return step


def _output(wanted: str) -> Callable[[Words], Step]:
    def make(words: Words) -> Step:
        # The words after it may be the guest's disks, where a script hands on its own "$@".
        if not words.words or words.words[0] not in ("setup", "final"):
            raise UsageError(
                "say which half of the step", hint="write setup or final before any disk"
            )
        is_setup = words.words[0] == "setup"
        _output_mode(words, wanted)
        options = virt_v2v.output_options(words)

        async def step(v2vdir: Path, reporter: Reporter) -> None:
            from v2v_async import steps

            if is_setup:
                await steps.output_setup_step(v2vdir, options, reporter)
            else:
                await steps.output_finalize_step(v2vdir, options, reporter)

        return step

    return make


def _copy(words: Words) -> Step:
    options = virt_v2v.copy_options(words)

    async def step(v2vdir: Path, reporter: Reporter) -> None:
        from v2v_async import steps

        await steps.copy_step(v2vdir, options, reporter)

    return step


_ON = tuple(option for option in table.OUTPUT if option.name == "-on")
INPUTS = {
    kind: Helper(
        f"helper-v2v-input-{kind}",
        "Serve the source's disks as DIR/in1, DIR/in2 … and write DIR/metadata.in.",
        table.INPUT,
        _input(kind),
    )
    for kind in modes.INPUT_KINDS
}
CONVERT = Helper(
    "helper-v2v-convert",
    "Convert the guest on DIR/in1, DIR/in2 … and write DIR/metadata.out.",
    (*table.CONVERSION, *table.NETWORK, *_ON),
    _convert,
)
OUTPUTS = {
    name: Helper(
        f"helper-v2v-output-{name}",
        "Make and serve the target disks (setup), then make the guest of them (final).",
        table.OUTPUT,
        _output(name),
        ("setup", "final"),
    )
    for name in modes.OUTPUTS
}
COPY = Helper(
    "helper-v2v-copy",
    "Copy DIR/in1 to DIR/out1, DIR/in2 to DIR/out2 …, all at once.",
    table.COPY,
    _copy,
)


def run_helper(helper: Helper, argv: Sequence[str]) -> int:
    """Run ``helper`` with ``argv``; return its exit status."""
    words = virt_v2v.read(argv, extra=(_V2VDIR,))
    if words.wants_help:
        _parser(helper).print_help()
        return 0
    if words.wants_version:
        Sink(sys.stdout)(version(helper.prog))
        return 0
    v2vdir = words.last("--v2vdir")
    if not v2vdir:
        raise UsageError("no directory named", hint="add --v2vdir DIR")
    virt_v2v.refuse_not_built(words, helper.options)
    step = helper.step(words)

    async def job(reporter: Reporter) -> None:
        await step(Path(v2vdir), reporter)

    edge = virt_v2v.edge_options(words)
    return run(job, edge, helper.prog, warnings=words.warnings, is_plain=True)


def _parser(helper: Helper) -> argparse.ArgumentParser:
    made = table.parser(
        helper.prog,
        (_V2VDIR, *helper.options, *table.SCREEN, *table.GENERAL[1:]),
        helper.summary,
        epilog="Options of the other steps are accepted and not looked at.",
    )
    positional = made._actions[0]  # argparse has no public way to it
    if helper.phases:
        positional.metavar, positional.help = "|".join(helper.phases), "which half of the step"
        positional.nargs = None
    elif helper not in INPUTS.values():
        positional.help = argparse.SUPPRESS
    return made


def _main(helper: Helper, argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return _guarded(lambda: run_helper(helper, words), helper.prog)


# The console scripts.
convert = partial(_main, CONVERT)
copy = partial(_main, COPY)
input_disk = partial(_main, INPUTS["disk"])
input_libvirt = partial(_main, INPUTS["libvirt"])
input_libvirtxml = partial(_main, INPUTS["libvirtxml"])
input_ova = partial(_main, INPUTS["ova"])
input_vcenter = partial(_main, INPUTS["vcenter"])
input_vddk = partial(_main, INPUTS["vddk"])
input_vmx = partial(_main, INPUTS["vmx"])
input_xen_ssh = partial(_main, INPUTS["xen-ssh"])
output_glance = partial(_main, OUTPUTS["glance"])
output_json = partial(_main, OUTPUTS["json"])
output_kubevirt = partial(_main, OUTPUTS["kubevirt"])
output_libvirt = partial(_main, OUTPUTS["libvirt"])
output_local = partial(_main, OUTPUTS["local"])
output_null = partial(_main, OUTPUTS["null"])
output_openstack = partial(_main, OUTPUTS["openstack"])
output_qemu = partial(_main, OUTPUTS["qemu"])
output_rhv = partial(_main, OUTPUTS["rhv"])
output_rhv_upload = partial(_main, OUTPUTS["rhv-upload"])
output_vdsm = partial(_main, OUTPUTS["vdsm"])
