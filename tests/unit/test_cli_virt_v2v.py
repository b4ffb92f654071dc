"""virt-v2v's options end up in the right place, and wrong ones are refused by name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from shutil import which

import pytest

from v2v_async.cli import table, virt_v2v
from v2v_async.cli.values import Target
from v2v_async.errors import NotBuiltError, UsageError
from v2v_async.options import CopyOptions, GuestOptions, MacMapping, OverlapOptions

MAC = "52:54:00:aa:22:33"
GOOD = ("-i", "disk", "a.img", "-o", "local", "-os", "/out")


def guest(*argv: str) -> GuestOptions:
    return virt_v2v.guest_options(virt_v2v.read(argv))


def test_everything_arrives() -> None:
    options = guest(
        *("-i", "local", "-if", "qcow2", "a", "b", "-o", "disk", "-os", "/out", "-of", "qcow2"),
        *("-oa", "preallocated", "-on", "new", "-oo", "compressed", "--parallel", "2"),
        *("--max-connections", "8", "--retries", "0", "--bandwidth", "8M", "--verify"),
        *("--bandwidth-file", "/rate", "--copier", "qemu-img"),
        *("--root", "/dev/sda2", "--key", "all:key:x", "--keys-from-stdin", "--echo-keys"),
        *("-n", "in:out", "-n", "rest", "-b", "br0:br1:br2", "-v", "-x"),
        *("--mac", "52:54:00:AA:BB:CC:network:mgmt", "--hostname", "h", "--update"),
        *("--mac", "52:54:00:aa:bb:cc:ip:10.0.0.2,10.0.0.1,24,1.1.1.1,::1"),
    )
    assert options.input.mode == "disk"
    assert options.input.arguments == ("a", "b")
    assert options.input.format == "qcow2"
    assert options.output.mode == "local"
    assert options.output.storage == "/out"
    assert options.output.format == "qcow2"
    assert options.output.allocation == "preallocated"
    assert options.output.name == "new"
    assert options.output.options == (("compressed", None),)
    assert options.copy == CopyOptions(
        parallel=2,
        max_connections=8,
        retries=0,
        bandwidth=1024 * 1024,
        bandwidth_file=Path("/rate"),
        verify=True,
        copier="qemu-img",
    )
    convert = options.convert
    assert convert.root == "/dev/sda2"
    assert convert.keys == ("all:key:x",)
    assert convert.keys_from_stdin
    assert convert.echo_keys
    assert convert.verbose
    assert convert.trace
    assert convert.customize == ("--hostname", "h", "--update")
    assert convert.network.networks == (("in", "out"), (None, "rest"))
    assert convert.network.bridges == (("br0", "br1:br2"),)
    assert convert.network.macs == (
        MacMapping("52:54:00:aa:bb:cc", "network", "mgmt"),
        MacMapping("52:54:00:aa:bb:cc", "ip", "10.0.0.2,10.0.0.1,24,1.1.1.1,::1"),
    )


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ([], OverlapOptions("auto", None, 20.0)),
        (["--overlap=on"], OverlapOptions("on")),
        (["--overlap", "off", "--overlap=auto"], OverlapOptions("auto")),
        (["--overlap-waste=0"], OverlapOptions(waste=0)),
        (["--overlap=on", "--overlap-waste", "1.5G"], OverlapOptions("on", waste=3 << 29)),
        (["--overlap-waste=2.5%"], OverlapOptions(waste_percent=2.5)),
    ],
)
def test_overlap(argv: list[str], wanted: OverlapOptions) -> None:
    assert guest(*GOOD, *argv).overlap == wanted


def test_defaults() -> None:
    options = guest(*GOOD)
    assert options.output.allocation == "sparse"
    assert options.output.format is None
    assert options.copy == CopyOptions()
    assert options.convert == type(options.convert)()


def test_old_spellings() -> None:
    assert guest(*GOOD, "--compressed", "-of", "qcow2").output.options == (("compressed", None),)
    words = virt_v2v.read(["--vddk-libdir", "/l", "--vdsm-compat", "1.1", "--password-file", "f"])
    assert words.pairs("-io") == (("vddk-libdir", "/l"),)
    assert words.pairs("-oo") == (("vdsm-compat", "1.1"),)
    assert words.last("-ip") == "f"


def test_obsolete_options_are_ignored_with_a_warning() -> None:
    words = virt_v2v.read([*GOOD, "--no-trim", "all", "--vmtype", "desktop"])
    assert [warning.split()[0] for warning in words.warnings] == ["--no-trim", "--vmtype"]
    virt_v2v.guest_options(words)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-i", "floppy"], "-i: unknown mode ‘floppy’"),
        (["-i", "disk", "-o", "loca"], "-o: unknown mode"),
        (["-i", "disk", "-o", "null"], "no disk was named"),
        (["-i", "disk", "", "-o", "null"], "name is empty"),
        (["-i", "disk", "a", "-o", "local"], "-o local: no directory"),
        (["-i", "disk", "a", "-o", "local", "-os", ""], "-o local: no directory"),
        (["-i", "disk", "a", "-o", "null", "-os", "d"], "-o null takes no -os"),
        (["-i", "disk", "a", "-o", "null", "-oa", "sparse"], "-o null takes no -oa"),
        (["-i", "disk", "a", "-o", "null", "-oc", "x"], "-o null takes no -oc"),
        (["-i", "disk", "a", "-o", "null", "-oo", "compressed"], "takes no -oo compressed"),
        ([*GOOD, "-op", "x"], "-o local takes no -op"),
        ([*GOOD, "-oo", "qemu-boot"], "takes no -oo qemu-boot"),
        ([*GOOD, "--qemu-boot"], "takes no -oo qemu-boot"),
        ([*GOOD, "-io", "x=y"], "takes no -io x"),
        ([*GOOD, "--vddk-config", "x"], "takes no -io vddk-config"),
        ([*GOOD, "-of", "vmdk"], "-of: unknown ‘vmdk’"),
        ([*GOOD, "--overlap", "yes"], "--overlap: unknown ‘yes’"),
        ([*GOOD, "--overlap-waste", "101%"], "‘101%’ is neither a size nor a part"),
        ([*GOOD, "--overlap-waste", "-1"], "‘-1’ is neither a size nor a part"),
        ([*GOOD, "-of", "raw", "-oo", "compressed"], "needs -of qcow2"),
        ([*GOOD, "-oa", "thin"], "-oa: unknown"),
        ([*GOOD, "-on", ""], "-on: the name is empty"),
        ([*GOOD, "-it", "tcp"], "-it: unknown"),
        ([*GOOD, "--root", "second"], "--root"),
        ([*GOOD, "--root", "/sda"], "--root"),
        ([*GOOD, "--parallel", "0"], "--parallel"),
        ([*GOOD, "--max-connections", "0"], "--max-connections"),
        ([*GOOD, "--retries", "-1"], "--retries"),
        ([*GOOD, "--bandwidth", "fast"], "--bandwidth"),
        ([*GOOD, "--bandwidth-file", ""], "--bandwidth-file"),
        ([*GOOD, "--copier", "dd"], "--copier"),
        ([*GOOD, "--parallel", "two"], "--parallel"),
        ([*GOOD, "--in-place"], "program of its own"),
        ([*GOOD, "-n", ""], "-n: nothing named"),
        ([*GOOD, "-n", "a:b", "-n", "a:c"], "-n maps ‘a’ twice"),
        ([*GOOD, "-b", "a", "-b", "b"], "-b maps the default twice"),
        ([*GOOD, "--mac", "x"], "--mac: cannot understand"),
        ([*GOOD, "--mac", "52-54-00-11-22-33:network:x"], "--mac: cannot understand"),
        ([*GOOD, "--mac", "52:54:00:11:22:33:IP:1.2.3.4"], "‘IP’ is no kind"),
        ([*GOOD, "--mac", "52:54:00:11:22:33:ip:"], "not an IP address"),
        ([*GOOD, "--mac", "52:54:00:11:22:33:ip:1.2.3.4,"], "gateway"),
        ([*GOOD, "--mac", "52:54:00:11:22:33:ip:1.2.3.4,1.1.1.1,x"], "prefix length"),
        ([*GOOD, "--mac", "52:54:00:11:22:33:ip:1.2.3.4,1.1.1.1,24,x"], "name server 1"),
        ([*GOOD, "--mac", f"{MAC}:network:x", "--mac", f"{MAC.upper()}:bridge:y"], "twice"),
        ([*GOOD, "--machine-readable=foo"], "not a target"),
        ([*GOOD, "--machine-readable=stream:x"], "not a target"),
        ([*GOOD, "--machine-readable=fd:x"], "no file descriptor"),
        ([*GOOD, "--events="], "no file named"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        guest(*argv)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("argv", "feature"),
    [
        ([*GOOD, "--memsize", "4096"], "--memsize"),
        ([*GOOD, "-m", "4096"], "--memsize"),
        ([*GOOD, "--smp", "4"], "--smp"),
        ([*GOOD, "--block-driver", "virtio-scsi"], "--block-driver"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_not_built(argv: list[str], feature: str) -> None:
    with pytest.raises(NotBuiltError) as caught:
        guest(*argv)
    assert caught.value.feature == feature
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    "selector",
    [
        "SECRET",
        "all:key",
        "all:key:",
        "all:kye:SECRET",
        "all:key:SE:CRET",
        "a:clevis:SECRET",
        ":file:x",
    ],
)
def test_a_wrong_key_is_refused_without_showing_it(selector: str) -> None:
    with pytest.raises(UsageError) as caught:
        guest(*GOOD, "--key", selector)
    shown = f"{caught.value} {caught.value.hint}"
    assert "SECRET" not in shown
    assert "CRET" not in shown


def test_keys_are_not_in_the_repr_of_a_command_line() -> None:
    assert "SECRET" not in repr(virt_v2v.read(["--key", "all:key:SECRET"]))


@pytest.mark.parametrize("key", ["all:key:x", "/dev/sda1:file:/k", "a:clevis", ":key:x"])
def test_keys_that_virt_v2v_takes(key: str) -> None:
    assert guest(*GOOD, "--key", key).convert.keys == (key,)


def test_print_source_needs_no_output() -> None:
    words = virt_v2v.read(["-i", "disk", "a", "--print-source"])
    assert virt_v2v.guest_options(words).input.arguments == ("a",)
    assert virt_v2v.edge_options(words).print_source


def test_targets() -> None:
    words = virt_v2v.read(
        [*GOOD, "--machine-readable=file:/m", "--events=fd:7", "-q", "--color", "--wrap"]
    )
    edge = virt_v2v.edge_options(words)
    assert edge.machine_readable == Target("file", path=Path("/m"))
    assert edge.events == Target("fd", fd=7)
    assert edge.quiet
    assert edge.colours


@pytest.mark.skipif(which("virt-v2v") is None, reason="virt-v2v is not installed")
def test_every_option_of_the_installed_virt_v2v_is_known() -> None:
    theirs = set()
    for query in ("--long-options", "--short-options"):
        listed = subprocess.run(["virt-v2v", query], capture_output=True, text=True, check=True)
        theirs |= {name.lstrip("-") for name in listed.stdout.split()}
    ours = {name.lstrip("-") for option in table.OPTIONS for name in option.names}
    assert theirs - ours == set()


def test_the_manual_names_every_shown_option() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    named = set(re.findall(r"`(-[^` =\[]*)", manual))
    shown = {name for option in table.SHOWN for name in option.names}
    assert shown - named == set()


def test_the_command_line_knows_the_options_that_inputs_and_outputs_take() -> None:
    """They are listed apart, so that --help needs no libnbd: they must not drift apart."""
    from v2v_async.cli import modes
    from v2v_async.input.registry import KINDS, input_class
    from v2v_async.output.registry import output_class

    assert set(KINDS) == set(modes.INPUT_KINDS)
    for name, kind in modes.INPUT_KINDS.items():
        assert dict(kind.options) == dict(input_class(name).option_help)
    for mode in modes.OUTPUTS.values():
        assert dict(mode.options) == dict(output_class(mode.name).option_help)
