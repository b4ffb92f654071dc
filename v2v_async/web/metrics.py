"""``/metrics``: the run for Prometheus.

Names follow its conventions: base units, the unit at the end, ``_total`` for counters. Disks have
their own series only while their guest is at work: there are tens of them then, and not thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from v2v_async import __version__
from v2v_async.batch.record.journal import Phase
from v2v_async.events import Event
from v2v_async.render.batch_state import BatchState
from v2v_async.web.feed import Feed

_UNKNOWN = float("nan")  # what Prometheus shows where there is nothing to tell


class Tally:
    """What a state does not keep, since it tells how things are: how often something happened."""

    def __init__(self) -> None:
        self.failures = 0
        self.retries = 0

    def count(self, event: Event) -> None:
        """Take in the next event."""
        if event.guest is not None and event.step is None and event.disk is None:
            self.failures += event.type == "failed"
            self.retries += event.type == "retrying"


class BatchCollector(Collector):
    """Makes the metrics of a batch when they are asked for."""

    def __init__(
        self, state: BatchState, tally: Tally, feed: Feed, clock: Callable[[], float]
    ) -> None:
        self._state = state
        self._tally = tally
        self._feed = feed
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """Yield all of them as of now."""
        now = self._clock()
        yield from self._run(now)
        yield from self._guests()
        yield from self._limits()
        yield from self._moved(now)
        yield from self._disks(now)

    def _run(self, now: float) -> Iterator[Metric]:
        state = self._state
        info = GaugeMetricFamily(
            "v2v_run_info",
            "The run, and the program that serves it.",
            labels=("run", "name", "version"),
        )
        info.add_metric((_text(state.run or ""), _text(state.name or ""), __version__), 1)
        yield info
        yield _gauge(
            "v2v_run_start_time_seconds",
            "When its supervisor began, in seconds since the epoch.",
            state.started,
        )
        yield _gauge("v2v_run_paused", "1 while no guest may begin.", int(state.is_paused))
        yield _gauge(
            "v2v_run_remaining_seconds",
            "How long it will still take, as far as that can be told.",
            0 if state.outcome is not None else state.eta(now),
        )
        yield _counter("v2v_events", "Events of the run.", self._feed.events)
        yield _gauge("v2v_streams", "Event streams that are being read.", self._feed.readers)

    def _guests(self) -> Iterator[Metric]:
        state = self._state
        guests = GaugeMetricFamily("v2v_guests", "Guests by phase.", labels=("phase",))
        for phase in get_args(Phase):
            guests.add_metric((phase,), state.counts.get(phase, 0))
        yield guests
        yield _gauge("v2v_guests_paused", "Guests that may not go on.", state.counts["paused"])
        waiting = GaugeMetricFamily(
            "v2v_guests_waiting", "Guests that wait, by what they wait for.", labels=("reason",)
        )
        for reason, count in state.waits.items():
            waiting.add_metric((_text(reason),), count)
        yield waiting
        yield _counter("v2v_guest_failures", "Guests that failed for good.", self._tally.failures)
        yield _counter(
            "v2v_guest_retries", "Attempts that failed and are made again.", self._tally.retries
        )

    def _limits(self) -> Iterator[Metric]:
        taken = GaugeMetricFamily(
            "v2v_limit_taken",
            "How much of a limit is in use, in its own unit.",
            labels=("resource",),
        )
        capacity = GaugeMetricFamily(
            "v2v_limit_capacity", "How much of it there is.", labels=("resource",)
        )
        for name, (in_use, most) in self._state.limits.items():
            taken.add_metric((_text(name),), in_use)
            capacity.add_metric((_text(name),), most)
        yield taken
        yield capacity

    def _moved(self, now: float) -> Iterator[Metric]:
        state = self._state
        yield _gauge(
            "v2v_to_move_bytes",
            "Bytes of all disks that have to move, as far as known.",
            state.to_move,
        )
        yield _gauge("v2v_moved_bytes", "Those of them that have.", state.has_moved)
        yield _counter(
            "v2v_copied_bytes",
            "Bytes copied since the supervisor began, those copied again among them.",
            state.moved_now,
        )
        yield _gauge(
            "v2v_rate_bytes_per_second", "Of all copies, over some seconds.", state.rate(now) or 0.0
        )

    def _disks(self, now: float) -> Iterator[Metric]:
        families = [
            GaugeMetricFamily(name, text, labels=("guest", "disk"))
            for name, text in (
                ("v2v_disk_to_move_bytes", "Bytes of a disk that have to move; guests at work."),
                ("v2v_disk_moved_bytes", "Those of them that have."),
                ("v2v_disk_rate_bytes_per_second", "Of the disk's copy, over some seconds."),
            )
        ]
        for guest in self._state.running.values():
            for number, disk in guest.disks.items():
                rate = (disk.rate.at(now) or 0.0) if disk.is_copying else 0.0
                labels = (_text(guest.name), str(number))
                for family, value in zip(
                    families, (disk.to_move, disk.has_moved, rate), strict=True
                ):
                    family.add_metric(labels, value)
        yield from families


class Exposition:
    """Writes the metrics in the format that the asker wants."""

    def __init__(self, collector: BatchCollector) -> None:
        # Not the library's own registry: it would tell of this process, and is shared by all.
        self._registry = CollectorRegistry()
        self._registry.register(collector)

    def write(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics and their content type; ``accept`` is the request's header."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _gauge(name: str, text: str, value: float | None) -> Metric:
    return GaugeMetricFamily(name, text, value=_UNKNOWN if value is None else value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _text(name: str) -> str:
    # An undecodable file name is a lone surrogate, which UTF-8 can't hold.
    return name.encode("utf-8", "replace").decode()
