"""Blocking calls in threads that nobody waits for.

anyio's own threads keep the program from ending while a call hangs, even one that was given up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

import anyio.lowlevel

T = TypeVar("T")


async def run_unwaited(call: Callable[[], T], name: str) -> T:
    """Return what ``call`` does in a thread of that name; when this is cancelled, leave it alone.

    Its objects are its own then, until it ends: who closes them has to know.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()  # what is cancelled already need not begin
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        if result.done():  # cancelled
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(T, value))

    def run() -> None:
        value: T | None = None
        problem: BaseException | None = None
        try:
            value = call()
        except BaseException as error:
            problem = error
        with suppress(RuntimeError):  # the loop may have been closed meanwhile
            loop.call_soon_threadsafe(tell, value, problem)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await result
