"""What ``v2v-async copy --help`` and ``nbdcopy --help`` say."""

from __future__ import annotations

import argparse

from rich.text import Text
from rich_argparse import RawDescriptionRichHelpFormatter

from v2v_async.cli import table
from v2v_async.cli.copy_words import COPY
from v2v_async.cli.help import HelpFormatter

_DESCRIPTION = (
    "Copy disks between files, devices and NBD servers, all at the same time. Takes nbdcopy(1)'s "
    "command line. Each source and target is a file, a block device, an NBD URI, - (stdin, "
    "stdout) or [ CMD ARGS … ], an NBD server that is started for the copy; a target may also be "
    "null:. Done means on stable storage, unless --no-flush is given."
)
_EXAMPLES = """\
Examples:
  v2v-async copy nbd://server/disk local.img
  v2v-async copy --verify --retries=20 nbds://far/disk [ qemu-nbd -f qcow2 disk.qcow2 ]
  v2v-async copy nbd+unix:///?socket=in1 /dev/vg/a nbd+unix:///?socket=in2 /dev/vg/b
  v2v-async copy --checkpoint /var/tmp/big nbd://far/big big.img    (again to go on)
  v2v-async copy [ nbdkit curl https://example.com/disk.img ] - | sha256sum

Sizes may end in K, M, G or T, which are powers of 1024.
"""


class _Formatter(HelpFormatter):
    """Leaves the lines of the examples as they are."""

    def _rich_fill_text(self, text: Text, width: int, indent: Text) -> Text:
        raw = (
            RawDescriptionRichHelpFormatter if text.plain.startswith("Examples") else HelpFormatter
        )
        return raw._rich_fill_text(self, text, width, indent)  # type: ignore[arg-type]


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser behind --help and completion: it never parses."""
    made = table.parser(
        prog,
        tuple(option for option in COPY if option.help is not None),
        _DESCRIPTION,
        _EXAMPLES,
        usage=f"{prog} [options] SOURCE TARGET [SOURCE TARGET …]",
        words=("SOURCE TARGET", "a source and its target, for each disk"),
    )
    made.formatter_class = _Formatter
    return made


NBDCOPY = """
Copy disks with the engine of v2v-async, by nbdcopy's command line:

    nbdcopy [--allocated] [--blkhash[=ALGORITHM[/SIZE]]] [--blkhash-file=FILE]
            [-C N|--connections=N] [--destination-is-zero|--target-is-zero]
            [--flush] [--no-extents] [-p|--progress|--progress=FD]
            [--queue-size=N] [--request-size=N] [-R N|--requests=N]
            [-S N|--sparse=N] [--synchronous] [-T N|--threads=N]
            [-v|--verbose]
            SOURCE DESTINATION

    SOURCE, DESTINATION := - | FILE | DEVICE | NBD-URI | [ CMD ARGS ... ]
    DESTINATION += null:

    nbdcopy --help
    nbdcopy -V|--version

The options mean what nbdcopy(1) says. ‘v2v-async copy’ has more of them.
"""
