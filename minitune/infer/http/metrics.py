"""/metrics in Prometheus' text form: the engine's counts as they stand, and what the HTTP side measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from minitune.infer.engine import Engine

GAUGES = {
    "slots": "answers that run at once",
    "running": "answers under way",
    "waiting": "answers that wait for a slot",
    "cache_tokens": "room for keys and values, in tokens",
    "cache_tokens_used": "tokens of running answers in the cache",
    "cache_tokens_kept": "tokens of finished answers in the cache, for prompts that begin the same",
}
COUNTERS = {
    "requests": "answers asked of the engine",
    "prompt_tokens": "tokens of prompts",
    "reused_tokens": "tokens of prompts that were found in the cache",
    "generated_tokens": "tokens drawn",
    "cancelled": "answers broken off",
    "preempted": "answers put back into the queue for want of room",
}
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class EngineCollector(Collector):
    """Reads the engine's stats at the moment of the scrape."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"minitune_{name}", text, getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"minitune_{name}", text, getattr(stats, name))


class Metrics:
    """A registry of its own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "minitune_http_responses", "responses by path and status", ("path", "status"), registry=self.registry
        )
        self.answers = Counter(
            "minitune_answers", "answers by model and by what ended them", ("model", "finish"), registry=self.registry
        )
        self.first = Histogram(
            "minitune_time_to_first_token_seconds", "from the request", buckets=SECONDS, registry=self.registry
        )
        self.whole = Histogram("minitune_answer_seconds", "from the request", buckets=SECONDS, registry=self.registry)
        self.token = Histogram(
            "minitune_time_per_token_seconds", "after the first", buckets=TOKEN_SECONDS, registry=self.registry
        )

    def watch(self, engine: Engine) -> None:
        self.registry.register(EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)
