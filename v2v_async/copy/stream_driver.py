"""One disk that comes from a stream, or goes to one: in order, once."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import anyio
import anyio.to_thread

from v2v_async.copy.digest import DiskDigest, parse_kind
from v2v_async.copy.endpoint import Endpoint
from v2v_async.copy.ends import End
from v2v_async.copy.file import FileEnd
from v2v_async.copy.geometry import SPARSE
from v2v_async.copy.hashing import HashedEnd
from v2v_async.copy.job import CopyJob, DiskResult
from v2v_async.copy.null import NullEnd, null_info
from v2v_async.copy.open_file import open_target as open_target_file
from v2v_async.copy.opening import Opened, close_side, connect, open_source
from v2v_async.copy.pipe import Stream, open_stream
from v2v_async.copy.stream import (
    StreamOptions,
    copy_between_streams,
    copy_from_stream,
    copy_to_stream,
)
from v2v_async.errors import UsageError
from v2v_async.events import Bytes, Reporter
from v2v_async.options import CopyOptions

_REPORT_EVERY_S = 0.2
_UNKNOWN_SIZE = 1 << 62  # null: has no size of its own


class StreamDriver:
    """A disk of which one side, or both, is a stream. Open it, then run it."""

    most = 1

    def __init__(self, job: CopyJob, options: CopyOptions, reporter: Reporter) -> None:
        self.job = job
        self.result = DiskResult(job.index)
        self.size = 0
        self._options = options
        self._reporter = reporter
        self._stream_in: Stream | None = None
        self._stream_out: Stream | None = None
        self._opened: Opened | None = None
        self._has_landed = 0
        for name in ("checkpoint", "verify", "repair"):
            if getattr(options, name):
                raise UsageError(
                    f"--{name}: a stream can't be read a second time",
                    hint="copy to or from a file, a device or an NBD server instead",
                )
        self._digest: DiskDigest | None = None

    async def open(self, stack: AsyncExitStack) -> None:
        """Open both sides.

        Raises:
            V2VError: one can't be.
        """
        job = self.job
        stack.push_async_callback(self._close)
        if job.source.kind == "stream":
            self._stream_in = await open_stream(_what(job.source), is_writing=False)
        else:
            self._opened = await open_source(job.source, wants_extents=self._options.extents)
            self.size = self._opened.info.size
        if job.target.kind == "stream":
            self._stream_out = await open_stream(_what(job.target), is_writing=True)
        else:
            self._opened = await self._open_target(job.target)
        if self._options.digest is not None:
            if self._opened is None:
                raise UsageError(
                    "--digest: not from one stream to another", hint="use sha256sum(1) on it"
                )
            self._digest = DiskDigest(parse_kind(self._options.digest), self._known_size)
        self._reporter.emit("planned", bytes=self.bytes(), details={"size": self.size})

    async def _open_target(self, target: Endpoint) -> Opened:
        if target.kind == "null":
            return Opened(target, NullEnd(), null_info(_UNKNOWN_SIZE))
        if target.kind == "file":
            end, info, is_zero = open_target_file(
                _what(target), None, keep=self._options.target_is_zero
            )
            return Opened(target, end, info, is_zero)
        return await connect(target, [])

    @property
    def remaining(self) -> int:
        """Bytes that are left, where that is known."""
        return max(0, self.size - self._has_landed)

    @property
    def _known_size(self) -> int | None:
        return None if self._stream_in is not None else self.size

    def set_share(self, connections: int) -> None:
        """Do nothing: it has one."""

    def bytes(self) -> Bytes:
        """Return what has landed so far; a stream's size is what has come of it."""
        total = max(self.size, self._has_landed)
        return Bytes(total=total, data=total, copied=self._has_landed)

    async def run(self) -> DiskResult:
        """Copy it.

        Raises:
            V2VError: it failed.
        """
        started = anyio.current_time()
        self._reporter.emit("started", bytes=self.bytes())
        async with anyio.create_task_group() as group:
            group.start_soon(self._report)
            length = await self._copy()
            group.cancel_scope.cancel()
        self.size = self._has_landed = length
        self.result.bytes = self.bytes()
        if self._digest is not None:
            self.result.digest = await anyio.to_thread.run_sync(self._digest.hexdigest)
        self._reporter.emit(
            "finished", bytes=self.bytes(), duration_s=anyio.current_time() - started
        )
        return self.result

    async def _copy(self) -> int:
        options, opened = self._options, self._opened
        if self._stream_in is not None and self._stream_out is not None:
            return await copy_between_streams(self._stream_in, self._stream_out, self._landed)
        assert opened is not None
        end: End = opened.end
        hashed = None
        if self._digest is not None:
            end = hashed = HashedEnd(
                opened.end, self._digest, has_size=self._known_size is not None
            )
        stream_options = StreamOptions(
            sparse=SPARSE if options.sparse is None else options.sparse,
            allocated=options.allocated,
            is_known_zero=options.target_is_zero or opened.is_zero,
            extents=options.extents,
            flush=options.flush,
            **_given(options),
        )
        if self._stream_out is not None:
            length = await copy_to_stream(
                end, opened.info, self._stream_out, self._landed, stream_options
            )
        else:
            assert self._stream_in is not None
            is_device = isinstance(opened.end, FileEnd) and opened.end.is_device
            grows = opened.endpoint.kind in ("file", "null") and not is_device
            length = await copy_from_stream(
                self._stream_in, end, opened.info, self._landed, stream_options, grows=grows
            )
        if hashed is not None:
            await anyio.to_thread.run_sync(hashed.finish, length)
        return length

    def _landed(self, length: int) -> None:
        """Called in the copy's thread."""
        self._has_landed += length

    async def _report(self) -> None:
        last = -1
        while True:
            if self._has_landed != last:
                last = self._has_landed
                self._reporter.emit("progress", bytes=self.bytes())
            await anyio.sleep(_REPORT_EVERY_S)

    async def _close(self) -> None:
        for stream in (self._stream_in, self._stream_out):
            if stream is not None:
                stream.close()
        if self._opened is not None:
            await close_side(self._opened)


def _what(endpoint: Endpoint) -> str | int:
    return endpoint.fd if endpoint.fd is not None else os.fspath(endpoint.address)


def _given(options: CopyOptions) -> dict[str, int]:
    """Return what a person asked for of what a stream has."""
    told = {"request_size": options.request_size, "requests": options.requests}
    if options.synchronous:
        told["requests"] = 1
    return {name: value for name, value in told.items() if value is not None}
