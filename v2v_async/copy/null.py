"""The target ``null:``, which takes everything and keeps nothing. Source: nbdcopy(1)."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int

from v2v_async.handle import Completion, Entries, ExportInfo
from v2v_async.units import KIB, MIB


def null_info(size: int) -> ExportInfo:
    """Return what ``null:`` offers to a source of ``size`` bytes."""
    return ExportInfo(
        size=size,
        minimum_block=1,
        preferred_block=4 * KIB,
        maximum_block=32 * MIB,
        is_read_only=False,
        can_multi_conn=True,
        can_zero=True,
        can_fast_zero=True,
        can_trim=True,
        can_flush=True,
        can_fua=False,
        has_extents=False,
    )


class NullEnd:
    """An end that has done every request when its call returns; it reads as zeroes."""

    is_lost = False

    def read(self, view: memoryview, offset: int, done: Completion) -> None:
        """Fill ``view`` with zeroes."""
        view[:] = bytes(len(view))
        done(c_int(0))

    def write(self, view: memoryview, offset: int, done: Completion) -> None:
        """Forget it."""
        done(c_int(0))

    def zero(
        self,
        length: int,
        offset: int,
        done: Completion,
        *,
        allocate: bool = False,
        only_fast: bool = False,
    ) -> None:
        """Forget it."""
        done(c_int(0))

    def block_status(
        self, length: int, offset: int, told: Callable[[Entries], None], done: Completion
    ) -> None:
        """Tell that all of it is a hole."""
        told([(length, 3)])
        done(c_int(0))

    def flush(self, done: Completion) -> None:
        """Do nothing."""
        done(c_int(0))

    def read_now(self, length: int, offset: int) -> bytearray:
        """Return zeroes."""
        return bytearray(length)

    def write_now(self, view: memoryview, offset: int) -> None:
        """Forget it."""

    def zero_now(
        self, length: int, offset: int, *, allocate: bool = False, only_fast: bool = False
    ) -> None:
        """Forget it."""

    def extents_now(self, length: int, offset: int) -> Entries:
        """Tell that all of it is a hole."""
        return [(length, 3)]

    def flush_now(self) -> None:
        """Do nothing."""

    def sever(self) -> None:
        """Do nothing."""

    def fileno(self) -> int:
        """Return -1: there is nothing to wait for."""
        return -1

    def direction(self) -> int:
        """Return 0: there is nothing to wait for."""
        return 0

    def notify_readable(self) -> None:
        """Do nothing."""

    def notify_writable(self) -> None:
        """Do nothing."""

    def close(self, *, politely: bool = True) -> None:
        """Do nothing."""
