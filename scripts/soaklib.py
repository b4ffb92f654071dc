"""What a soak is made of: disks of random content, what can stand on each side, and the comparison.

Everything about a round is drawn from its seed before it begins; only the moments at which things
happen to the copy differ from run to run.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
FILL = 0xD5  # what a dirty target holds
_BLOCK = 64 << 10

SURVIVES = frozenset({"file", "qcow2", "forgets", "forgets-private"})
"""Targets whose server may be killed."""


@dataclass
class Disk:
    """One disk of a round. Sizes are bytes, ``slack`` what the target has more than the source."""

    size: int
    slack: int
    content: str
    source: str
    target: str
    is_dirty: bool
    source_filters: list[str] = field(default_factory=list)
    target_filters: list[str] = field(default_factory=list)
    source_proxy: float | None = None
    target_proxy: float | None = None
    source_errors: int = 0
    target_errors: int = 0
    cluster: int = 65536

    @property
    def can_kill_source(self) -> bool:
        """Whether a server can be killed there."""
        return self.source != "local"

    @property
    def can_kill_target(self) -> bool:
        """Whether the target's storage outlives its server."""
        return self.target in SURVIVES

    @property
    def may_lose_client(self) -> bool:
        """Whether the target bears that the copier is killed: nbdkit 1.32 aborts then."""
        return self.target in SURVIVES or self.target == "local"


@dataclass
class Fault:
    """What happens ``gap_s`` after the one before; ``share`` is that of connections to cut.

    With a ``share`` of 1 a copier is killed only when it has left a checkpoint.
    """

    gap_s: float
    kind: str
    disk: int
    down_s: float
    share: float


@dataclass
class Plan:
    """A round."""

    disks: list[Disk]
    options: list[str]
    faults: list[Fault]
    interval_s: float
    has_checkpoint: bool
    has_digest: bool


def draw(noise: random.Random, *, is_small: bool = False) -> Plan:
    """Draw a round."""
    disks = [_disk(noise, is_small) for _ in range(noise.choice([1, 1, 2, 3, 4]))]
    has_checkpoint = noise.random() < 0.5
    faults = _faults(noise, disks, is_small)
    if has_checkpoint and all(disk.may_lose_client for disk in disks):
        # Long enough that something has been remembered.
        for _ in range(noise.choice([1, 1, 2, 3])):
            at = noise.randint(0, len(faults))
            faults.insert(
                at, Fault(noise.uniform(0.2, 2), "copier", 0, 0, noise.choice([0.3, 1, 1]))
            )
    has_digest = noise.random() < 0.5
    options = _options(noise, disks, faults)
    if has_digest:
        options.append("--digest")
    return Plan(disks, options, faults, noise.choice([0.2, 0.5, 1, 3]), has_checkpoint, has_digest)


def _disk(noise: random.Random, is_small: bool) -> Disk:
    most = 16 if is_small else noise.choice([8, 24, 64, 64, 200])
    size = noise.randint(1, most) * MIB + noise.choice([0, 0, 1, 511, 512, 4097, 65536, 777_777])
    target = noise.choice(
        ["file", "file", "qcow2", "qcow2", "forgets", "forgets-private", "local", "cow", "memory"]
    )
    disk = Disk(
        size=size,
        slack=noise.choice([0, 0, 512, 65536, 3 * MIB + 512]),
        content=noise.choice(["dense", "fragmented", "fragmented", "zero", "specks", "mixed"]),
        source=noise.choice(["file", "file", "qcow2", "local"]),
        target=target,
        is_dirty=noise.random() < 0.5 and target != "memory",
        cluster=noise.choice([4096, 65536, 65536, 1 << 20]),
    )
    if disk.source == "file":
        disk.source_filters = noise.choice(
            [[], [], ["noextents"], ["multi-conn"], ["blocksize-policy"], ["delay"]]
        )
    if disk.target == "file":
        disk.target_filters = noise.choice([[], ["nozero"], ["multi-conn"], ["blocksize-policy"]])
    if disk.source != "local" and noise.random() < 0.35:
        disk.source_proxy = noise.choice([0, 0, 0.001, 0.01])
    if disk.may_lose_client and disk.target != "local" and noise.random() < 0.35:
        disk.target_proxy = noise.choice([0, 0, 0.001, 0.01])
    if disk.source == "file" and noise.random() < 0.3:
        disk.source_errors = noise.choice([2, 10, 30])
    if disk.target == "file" and noise.random() < 0.3:
        disk.target_errors = noise.choice([2, 10, 30])
    if "blocksize-policy" in disk.source_filters or disk.source == "qcow2":
        disk.size = -(-disk.size // 512) * 512
    if disk.target == "local":
        disk.slack = 0
    elif disk.target == "qcow2" or disk.target_filters == ["blocksize-policy"]:
        disk.slack += -(disk.size + disk.slack) % 512
    return disk


def _faults(noise: random.Random, disks: list[Disk], is_small: bool) -> list[Fault]:
    bears_kill = all(disk.may_lose_client for disk in disks)
    count = noise.choice([1, 2, 4] if is_small else [0, 2, 3, 5, 8])
    mean = noise.choice([0.1, 0.5, 0.5, 1.0, 1.5])
    faults = []
    for _ in range(count):
        number = noise.randrange(len(disks))
        disk = disks[number]
        kinds = ["nothing"]
        if disk.can_kill_source:
            kinds += ["source"] * 2
        if disk.can_kill_target:
            kinds += ["target"] * 4
        if disk.can_kill_source and disk.can_kill_target:
            kinds += ["both"]
        for side, delay in (("source", disk.source_proxy), ("target", disk.target_proxy)):
            if delay is not None:
                kinds += [f"cut-{side}", f"hold-{side}"]
        if bears_kill:
            kinds += ["copier"] * 3
        down_s = noise.choice([0, 0, 0.3, noise.uniform(0, 2)])
        kind = noise.choice(kinds)
        share = noise.choice([0.3, 1])
        faults.append(Fault(noise.expovariate(1 / mean), kind, number, down_s, share))
    return faults


def _options(noise: random.Random, disks: list[Disk], faults: list[Fault]) -> list[str]:
    options = []
    is_slowed = bool(faults) and noise.random() < 0.75
    if is_slowed:
        # So long that the faults fall into it.
        wanted_s = sum(fault.gap_s for fault in faults) + noise.uniform(1, 4)
        rate = max(1, int(sum(disk.size for disk in disks) * 0.6 / wanted_s / 1024))
        options += [f"--bandwidth={rate}KB/s"]
    if noise.random() < 0.5:
        options += [f"--connections={noise.choice([1, 1, 2, 3, 8])}"]
    if noise.random() < 0.2:
        options += [f"--max-connections={noise.choice([4, 5, 9])}"]
    if noise.random() < 0.3:
        smallest = 14 if max(disk.size for disk in disks) < 32 * MIB else 17
        options += [f"--request-size={1 << noise.randint(smallest, 22)}"]
    if noise.random() < 0.3:
        options += [f"--requests={noise.choice([1, 2, 7, 16, 64])}"]
    if noise.random() < 0.2:
        options += [f"--threads={noise.randint(1, 4)}"]
    if noise.random() < 0.2:
        options += [f"--sparse={noise.choice([0, 4096, 65536])}"]
    if noise.random() < 0.15:
        options += ["--no-extents"]
    if noise.random() < 0.15:
        options += ["--allocated"]
    if noise.random() < 0.07:
        options += ["--synchronous"]
    if noise.random() < 0.2:
        options += [f"--parallel={noise.randint(1, len(disks))}"]
    if noise.random() < 0.25:
        options += ["--verify"]
        if noise.random() < 0.3:
            options += ["--repair"]
    if not any(disk.is_dirty for disk in disks) and noise.random() < 0.4:
        options += ["--destination-is-zero"]
    return options


# Content.


def write_source(path: Path, disk: Disk, noise: random.Random) -> None:
    """Write the disk's content as a raw file."""
    size = disk.size
    with path.open("wb") as file:
        file.truncate(size)
        if disk.content == "zero":
            file.seek(size // 2)
            file.write(bytes(min(300_000, size - size // 2)))  # allocated zeroes
        elif disk.content in ("dense", "specks"):
            for at in range(0, size, MIB):
                piece = bytearray(noise.randbytes(min(MIB, size - at)))
                if disk.content == "specks":
                    for _ in range(12):
                        start = noise.randrange(len(piece))
                        run = noise.choice([1, 512, 4096, 8192, 70_000])
                        end = min(start + run, len(piece))
                        piece[start:end] = bytes(end - start)
                file.write(piece)
        else:
            step = 64 << 10 if disk.content == "fragmented" else 2 * MIB
            for at in range(0, size, step):
                if noise.random() < 0.4:
                    start = at + noise.choice([0, 0, noise.randrange(step)])
                    if start < size:
                        file.seek(start)
                        length = min(noise.choice([1, 4096, step // 2, step]), size - start)
                        file.write(noise.randbytes(length))


def write_target(path: Path, disk: Disk) -> None:
    """Write what the target holds before the copy, as a raw file."""
    size = disk.size + disk.slack
    with path.open("wb") as file:
        file.truncate(size)
        if disk.is_dirty:
            full = bytes([FILL]) * MIB
            for at in range(0, size, MIB):
                file.write(full[: min(MIB, size - at)])


def to_qcow2(raw: Path, made: Path, cluster: int) -> None:
    """Make a qcow2 image of a raw file."""
    _run("convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", raw, made)


def to_raw(image: Path, made: Path) -> None:
    """Make a raw file of a qcow2 image."""
    _run("convert", "-f", "qcow2", "-O", "raw", image, made)


def _run(*arguments: object) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


# Comparison.


def wrong_ranges(source: Path, target: Path, disk: Disk) -> list[tuple[int, int]]:
    """Return the ranges (offset, length) of 4 KiB blocks that are wrong in a raw target.

    What lies behind the source must be as it was; the block in which the source ends may have been
    padded with zeroes.
    """
    size = disk.size
    whole = size + (disk.slack if disk.target != "local" else 0)
    if target.stat().st_size != whole:
        return [(target.stat().st_size, whole)]
    wrong: list[tuple[int, int]] = []
    with source.open("rb") as one, target.open("rb") as other:
        for at in range(0, size, MIB):
            length = min(MIB, size - at)
            expected, found = one.read(length), other.read(length)
            if expected != found:
                _narrow(wrong, at, expected, found)
    tail = bytes([FILL if disk.is_dirty else 0])
    with target.open("rb") as other:
        other.seek(size)
        rest = other.read()
    padding = min(-size % 4096, len(rest))
    if rest[:padding].strip(b"\0").strip(tail) or rest[padding:].strip(tail):
        wrong.append((size, len(rest)))
    return wrong


def _narrow(wrong: list[tuple[int, int]], at: int, expected: bytes, found: bytes) -> None:
    for start in range(0, len(expected), 4096):
        piece = expected[start : start + 4096]
        if piece == found[start : start + 4096]:
            continue
        if wrong and sum(wrong[-1]) == at + start:
            wrong[-1] = (wrong[-1][0], wrong[-1][1] + len(piece))
        else:
            wrong.append((at + start, len(piece)))


def disk_digest(path: Path) -> str:
    """Return what --digest has to print, computed in the plainest way."""
    size = path.stat().st_size
    outer = hashlib.sha256()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        for at in range(0, size, _BLOCK):
            outer.update(hashlib.sha256(content[at : at + _BLOCK]).digest())
    outer.update(size.to_bytes(8, "little"))
    return outer.hexdigest()


# Events of a copier.


@dataclass
class Told:
    """What a run's events tell. Bytes over all disks."""

    is_started: bool = False
    copied: int = 0
    retried: int = 0
    resumed: int = 0
    retries: int = 0


def told(path: Path) -> Told:
    """Read the events of a run that may have been killed in the middle of a line."""
    last: dict[int, dict[str, int]] = {}
    result = Told()
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return result
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if "disk" not in event:
            continue
        result.is_started |= event["type"] == "started"
        result.retries += event["type"] == "retrying"
        if event.get("bytes"):
            last[event["disk"]] = event["bytes"]
    for amounts in last.values():
        result.copied += amounts["copied"]
        result.retried += amounts["retried"]
        result.resumed += amounts["resumed"]
    return result
