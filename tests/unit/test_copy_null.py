from __future__ import annotations

from typing import Any

from v2v_async.copy.ends import End
from v2v_async.copy.null import NullEnd, null_info


def test_it_takes_everything_during_the_call() -> None:
    end: End = NullEnd()
    codes: list[int] = []

    def done(error: Any) -> int:
        codes.append(error.value)
        return 1

    told: list[list[tuple[int, int]]] = []
    view = memoryview(bytearray(b"x" * 10))
    end.write(view, 1 << 60, done)
    end.zero(1 << 40, 0, done, allocate=True, only_fast=True)
    end.read(view, 5, done)
    end.block_status(77, 3, told.append, done)
    end.flush(done)
    assert codes == [0] * 5
    assert bytes(view) == bytes(10)
    assert told == [[(77, 3)]]
    assert end.fileno() == -1
    assert not end.is_lost


def test_it_is_as_large_as_the_source() -> None:
    info = null_info(12345)
    assert info.size == 12345
    assert info.can_multi_conn
    assert not info.is_read_only
