"""Numbers of a server for Prometheus: what the engine counts, and times as clients see them.

TTFT is from a request's body to its first token, waiting included. The time between tokens is what
passed since the tokens before, divided by how many came at once.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvjax.serve.engine import Engine
from kvjax.serve.job import Step

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One server's numbers, in a registry of their own.

    Attributes:
      open: answers that are not at their end, those that wait for a row included.
    """

    def __init__(self, engine: Engine):
        self.open = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineNumbers(engine))
        self._requests = Counter(
            "kvjax_requests",
            "Requests by what became of them: stop, length, read (a context), gone, late, refused,"
            " failed. Those without a host, key, type or size that is taken are not counted.",
            ("path", "outcome"),
            registry=self.registry,
        )
        self._first = Histogram(
            "kvjax_time_to_first_token_seconds",
            "From a request's body to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "kvjax_inter_token_seconds",
            "Between a token and the one before.",
            buckets=_BETWEEN,
            registry=self.registry,
        )
        self._whole = Histogram(
            "kvjax_request_seconds",
            "From a request's body to the end of its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def page(self) -> bytes:
        """All numbers as Prometheus reads them."""
        return generate_latest(self.registry)

    def ended(self, path: str, outcome: str) -> None:
        """Count a request."""
        self._requests.labels(path, outcome).inc()

    @contextmanager
    def opened(self, count: int) -> Iterator[None]:
        """Count answers as open."""
        self.open += count
        try:
            yield
        finally:
            self.open -= count

    async def timed(self, steps: AsyncGenerator[Step], begun: float) -> AsyncGenerator[Step]:
        """The steps of an answer as they come, their times noted; it was asked for at `begun`."""
        first, before = True, begun
        try:
            async for step in steps:
                now, count = time.perf_counter(), len(step.tokens)
                if count and first:
                    self._first.observe(now - begun)
                    # Tokens that come with the first one have no time of their own.
                    first, before = False, now
                elif count:
                    for _ in range(count):
                        self._between.observe((now - before) / count)
                    before = now
                yield step
            self._whole.observe(time.perf_counter() - begun)
        finally:
            await steps.aclose()


class _EngineNumbers(Collector):
    """What `Engine.stats` counts, asked for when Prometheus asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Each number with its name."""
        stats = self._engine.stats()
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"kvjax_{name}", told, value=getattr(stats, name))
        for name, told in _COUNTERS.items():
            yield CounterMetricFamily(f"kvjax_{name}", told, value=getattr(stats, name))
        pages = GaugeMetricFamily("kvjax_pages", "Pages of the pool by state.", labels=("state",))
        for state in ("free", "held", "shared"):
            pages.add_metric((state,), getattr(stats, f"{state}_pages"))
        yield pages


_GAUGES = {
    "queued": "Requests that wait for a row.",
    "running": "Requests that are being answered.",
    "rows": "Requests that can be answered at once.",
}
_COUNTERS = {
    "contexts_dropped": "Contexts that others took the place of.",
    "evictions": "Rows whose cache was compressed again.",
    "forced_evictions": "Rows that keep less than their rule says, as pages ran short.",
    "swaps": "Rows that were moved to host memory.",
    "tokens_in": "Tokens of prompts that were read.",
    "tokens_out": "Tokens of answers that were handed out.",
}
