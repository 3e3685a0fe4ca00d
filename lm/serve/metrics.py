"""Metrics in Prometheus' text format."""

import time
from collections.abc import Mapping
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lm.serve.worker import Call, Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST


class Metrics:
    """What is counted. `model` is the name that was asked for, `variant` the one that answered."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own, names = {"registry": self._registry}, ("model", "variant")
        self._finished = Counter(
            "lm_requests",
            "Sequences by what ended them; 'cancelled': the client left, or time was over.",
            (*names, "finish_reason"),
            **own,
        )
        self._prompt = Counter("lm_prompt_tokens", "Tokens of prompts.", names, **own)
        self._cached = Counter(
            "lm_cached_prompt_tokens", "Tokens of prompts found in the cache.", names, **own
        )
        self._generated = Counter("lm_generation_tokens", "Tokens generated.", names, **own)
        self._first = Histogram(
            "lm_time_to_first_token_seconds", "From the request.", names, buckets=SECONDS, **own
        )
        self._per_token = Histogram(
            "lm_time_per_output_token_seconds",
            "Between tokens of a sequence, on average.",
            names,
            buckets=PER_TOKEN,
            **own,
        )
        self._whole = Histogram(
            "lm_request_seconds", "Of whole requests.", names, buckets=SECONDS, **own
        )
        self._responses = Counter(
            "lm_http_responses", "Responses by path and status.", ("path", "status"), **own
        )
        gauges = {
            "running": "Sequences that are computed.",
            "waiting": "Sequences in the queue.",
            "used": "Pages of the KV cache in use.",
            "pages": "Pages of the KV cache.",
            "preempted": "Sequences that gave up their pages, so far.",
        }
        self._gauges = {
            field: Gauge(f"lm_{_GAUGES[field]}", text, ("variant",), **own)
            for field, text in gauges.items()
        }

    def response(self, path: str, status: int) -> None:
        """Counts an HTTP response."""
        self._responses.labels(path, str(status)).inc()

    def call(self, model: str, call: Call, reasons: list[str], prompt: int, cached: int) -> None:
        """Counts a call that has ended: why each sequence did, and tokens of its prompts."""
        names = (model, call.variant.name)
        for reason in reasons:
            self._finished.labels(*names, reason).inc()
        self._prompt.labels(*names).inc(prompt)
        self._cached.labels(*names).inc(cached)
        self._whole.labels(*names).observe(time.perf_counter() - call.submitted)
        for each in call.continuations:
            if each.began is None or each.ended is None:
                continue
            self._generated.labels(*names).inc(each.sent)
            self._first.labels(*names).observe(each.began - call.submitted)
            if each.sent > 1:
                self._per_token.labels(*names).observe((each.ended - each.began) / (each.sent - 1))

    def text(self, stats: Mapping[str, Stats]) -> bytes:
        """The page that Prometheus reads."""
        for variant, of_variant in stats.items():
            for field, gauge in self._gauges.items():
                gauge.labels(variant).set(getattr(of_variant, field))
        return prometheus_client.generate_latest(self._registry)


_GAUGES: dict[str, Any] = {
    "running": "requests_running",
    "waiting": "requests_waiting",
    "used": "cache_pages_used",
    "pages": "cache_pages",
    "preempted": "preemptions",
}
