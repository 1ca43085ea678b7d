"""What a server counts, in Prometheus' words: GET /metrics.

multistep_requests_total{route,status}     multistep_request_seconds{route}     multistep_queue_depth
multistep_batch_texts                      multistep_batch_seconds              multistep_tokens_total{kind}
multistep_answers_total{stage}             process_resident_memory_bytes ... (Linux)
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Numbers:
    """One server's counters. Labels are of a known few: whatever a client sends makes no new series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter("multistep_requests", "Answered.", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            "multistep_request_seconds", "From head to end.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._texts = Histogram(
            "multistep_batch_texts", "Texts answered together.", buckets=_TEXTS, registry=self.registry
        )
        self._batch_s = Histogram("multistep_batch_seconds", "Of a batch.", buckets=_SECONDS, registry=self.registry)
        self._depth = Gauge("multistep_queue_depth", "Texts that wait.", registry=self.registry)
        self._tokens = Counter("multistep_tokens", "Read and written.", ["kind"], registry=self.registry)
        self._answers = Counter("multistep_answers", "By the stage that answered.", ["stage"], registry=self.registry)
        self.cut = 0  # requests that were still being answered when the time to drain was over
        self._known: dict[tuple[str, int], Counter] = {}
        self._timers: dict[str, Histogram] = {}

    def watch_queue(self, depth: Callable[[], float]) -> None:
        self._depth.set_function(depth)

    def request(self, route: str, status: int, seconds: float) -> None:
        key = (route, status)
        if key not in self._known:  # a look-up by labels costs more than the count
            self._known[key] = self._requests.labels(route, str(status))
        self._known[key].inc()
        if route not in self._timers:
            self._timers[route] = self._seconds.labels(route)
        self._timers[route].observe(seconds)

    def batch(self, texts: int, seconds: float) -> None:
        self._texts.observe(texts)
        self._batch_s.observe(seconds)

    def answered(self, stage: str, count: int = 1) -> None:
        self._answers.labels(stage or "whole").inc(count)

    def tokens(self, read: int, written: int) -> None:
        self._tokens.labels("prompt").inc(read)
        self._tokens.labels("completion").inc(written)

    def text(self) -> bytes:
        return generate_latest(self.registry)
