"""What the scripts that make and boot guests share: a cache folder, ext4 images, MBRs.

Standard library only: these scripts run before any virtual environment exists.

    CACHE/NAME-HASH/            complete, never changed again
    CACHE/.NAME.lock            held while one is built
    CACHE/.building-NAME-XXXX/  a build that goes on, or was killed: the next build removes it
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn
from xml.sax.saxutils import quoteattr

SECTOR = 512
MIB = 1 << 20

FIRST_PARTITION_SECTOR = 2048
"""The usual 1 MiB gap before the first partition, where GRUB's core image lives."""

EXT4_FEATURES = "^metadata_csum_seed,^orphan_file"
"""Left out so that an image made by a new mke2fs (1.47.1 turned these on) is read by Debian 12's
GRUB and e2fsprogs too."""

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


class GuestError(Exception):
    """What a person should be told, without a traceback."""


def say(message: str) -> None:
    """Tell the person watching; standard output belongs to the result."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def main_wrapper(main: Callable[[], int]) -> NoReturn:
    """Run `main`, turn its errors into one line and SIGTERM and SIGHUP into an unwinding exit."""

    def unwind(signum: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, unwind)
    os.environ["PATH"] = f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"
    try:
        sys.exit(main())
    except GuestError as error:
        say(f"error: {error}")
        sys.exit(1)


def need_programs(packages: Mapping[str, str]) -> None:
    """Raise GuestError, with the command that adds it, if a program is not installed."""
    missing = sorted(
        {package for program, package in packages.items() if not shutil.which(program)}
    )
    if missing:
        raise GuestError(f"missing programs; try: apt-get install {' '.join(missing)}")


def run(
    argv: Sequence[str | Path],
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
) -> str:
    """Run a command and return its standard output.

    Its output is also appended to `log`. Raises GuestError with the tail of it on failure.
    """
    result = subprocess.run(
        [str(word) for word in argv],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", **(env or {})},
        check=False,
    )
    if log:
        with log.open("a") as file:
            file.write(f"$ {' '.join(map(str, argv))}\n{result.stdout}")
    if result.returncode != 0:
        tail = "\n".join(result.stdout.splitlines()[-15:])
        raise GuestError(f"{argv[0]} failed with status {result.returncode}:\n{tail}")
    return result.stdout


# --- the cache -----------------------------------------------------------------------------------


def cache_root() -> Path:
    """Return the folder for what is expensive to make, which may not exist yet."""
    if named := os.environ.get("V2V_ASYNC_CACHE"):
        return Path(named).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).absolute() / "v2v-async"


def recipe_hash(*scripts: Path, extra: str = "") -> str:
    """Return 16 hexadecimal digits that change when a script that makes the guest changes."""
    digest = hashlib.sha256(extra.encode())
    for script in (*scripts, Path(__file__)):
        digest.update(script.read_bytes())
    return digest.hexdigest()[:16]


def cached(
    name: str, recipe: str, build: Callable[[Path, Path], None], *, needs_root: bool = False
) -> Path:
    """Return the folder NAME-RECIPE of the cache, made by `build(work, final)` if it is not there.

    `build` fills `work/out`, which is renamed to `final` when it is complete. Two runs at the same
    time build once; a killed build is never taken for a complete one.
    """
    root = cache_root()
    final = root / f"{name}-{recipe}"
    if final.is_dir():
        return final
    if needs_root and os.geteuid() != 0:
        raise GuestError(f"{final} is not there yet, and making it needs root")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{name}.lock"):
        if final.is_dir():
            return final
        for stale in root.glob(f".building-{name}-*"):
            remove_tree(stale)
        start = time.monotonic()
        work = Path(tempfile.mkdtemp(prefix=f".building-{name}-", dir=root))
        try:
            (work / "out").mkdir()
            build(work, final)
            (work / "out").rename(final)
        finally:
            remove_tree(work)
        for outdated in root.glob(f"{name}-{'[0-9a-f]' * 16}"):
            if outdated != final and time.time() - outdated.stat().st_mtime > OUTDATED_AFTER_S:
                remove_tree(outdated)
        say(f"made {final} in {time.monotonic() - start:.0f} s")
    return final


OUTDATED_AFTER_S = 24 * 3600
"""A guest of another version of the scripts is removed only when no test run can still use it."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel drops it when this process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is making it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unmount_below(tree: Path) -> None:
    """Unmount what debootstrap left mounted below a folder."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = f"{tree.resolve()}/"
    for mount in sorted((m for m in mounted if m.startswith(inside)), reverse=True):
        run(["umount", "--lazy", mount])


def remove_tree(tree: Path) -> None:
    """Remove a folder, but nothing that a killed debootstrap left mounted in it."""
    unmount_below(tree)
    shutil.rmtree(tree)


def copy_guest(folder: Path, target: Path) -> Path:
    """Copy a guest of the cache to a folder where it may be changed, sparse as it is."""
    target = target.absolute()
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        run(["cp", "--sparse=always", "--reflink=auto", file, target])
    for xml in target.glob("*.xml"):
        for name in [file.name for file in folder.iterdir()]:
            old, new = quoteattr(str(folder / name)), quoteattr(str(target / name))
            xml.write_text(xml.read_text().replace(f"file={old}", f"file={new}"))
    return target


def isolated(argv: Sequence[str | Path]) -> list[str | Path]:
    """Put a command where its children and mounts die with it, if this system can."""
    # setpriv: even a SIGKILL of this script ends the command.
    unshare = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--fork",
        "--pid",
        "--kill-child",
        "--mount",
    ]
    for options in ([], ["--propagation", "unchanged"]):
        probe = subprocess.run([*unshare, *options, "true"], capture_output=True, check=False)
        if probe.returncode == 0:
            return [*unshare, *options, *argv]
    return list(argv)


# --- disk images ---------------------------------------------------------------------------------


def make_ext4(
    image: Path, size: int, uuid: str, label: str, *, tree: Path | None = None, offset: int = 0
) -> None:
    """Make an ext4 of `size` bytes at `offset` of a sparse file, filled from `tree`."""
    with image.open("ab") as file:
        file.truncate(offset + size)
    argv: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"]
    argv += ["-O", EXT4_FEATURES, "-U", uuid, "-L", label]
    argv += ["-E", f"offset={offset},hash_seed={uuid},lazy_itable_init=0,root_owner=0:0,nodiscard"]
    if tree:
        argv += ["-d", tree]
    run([*argv, image, f"{size // 1024}k"])


def write_mbr(image: Path, partition_size: int, boot_code: bytes = b"", core: bytes = b"") -> None:
    """Write an MBR with one active Linux partition, and a boot loader before that partition.

    The layout is the one of grub-bios-setup: boot code in the first 440 bytes, core image from
    sector 1. Source: GRUB manual, "BIOS installation".
    """
    if len(core) > (FIRST_PARTITION_SECTOR - 1) * SECTOR:
        raise GuestError("the boot loader does not fit before the first partition")
    # Boot flag, CHS (unused), type 0x83 Linux, CHS (unused), first sector, number of sectors.
    entry = struct.pack(
        "<B3sB3sII",
        0x80,
        b"\xfe\xff\xff",
        0x83,
        b"\xfe\xff\xff",
        FIRST_PARTITION_SECTOR,
        partition_size // SECTOR,
    )
    mbr = boot_code[:440].ljust(440, b"\0") + b"V2VA\0\0" + entry.ljust(64, b"\0") + b"\x55\xaa"
    with image.open("r+b") as file:
        file.write(mbr + core)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, holes included."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pattern(name: str, size: int) -> bytes:
    """Return `size` bytes that do not compress, hold no zero blocks, and depend only on `name`."""
    return hashlib.shake_256(name.encode()).digest(size)


def disk_entry(path: Path, role: str, *, file_format: str) -> dict[str, object]:
    """Describe a disk of a guest for its guest.json."""
    info = run(["qemu-img", "info", "--output=json", path])
    match = re.search(r'"virtual-size": (\d+)', info)
    return {
        "file": path.name,
        "format": file_format,
        "role": role,
        "virtual_size": int(match[1]) if match else path.stat().st_size,
        "sha256": file_sha256(path),
    }


def write_libvirt_xml(xml: Path, name: str, folder: Path, disks: Mapping[str, str]) -> None:
    """Write the libvirt XML of a source guest with IDE disks, {file in `folder`: format}."""
    devices = "".join(
        f"""
    <disk type='file' device='disk'>
      <driver name='qemu' type='{file_format}'/>
      <source file={quoteattr(str(folder / file))}/>
      <target dev='hd{chr(ord("a") + index)}' bus='ide'/>
    </disk>"""
        for index, (file, file_format) in enumerate(disks.items())
    )
    xml.write_text(f"""\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='KiB'>1048576</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  <devices>{devices}
    <interface type='network'>
      <mac address='52:54:00:76:32:76'/>
      <source network='default'/>
      <model type='e1000'/>
    </interface>
    <serial type='pty'/>
    <console type='pty'/>
  </devices>
</domain>
""")
