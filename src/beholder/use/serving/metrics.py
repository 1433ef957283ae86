"""What ``/metrics`` tells, in Prometheus' words."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """In a registry of its own. ``waiting``, ``running``: answers."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("beholder_requests_total", "Requests by route and status.", ["route", "code"], **made)
        self.seconds = Histogram("beholder_request_seconds", "Until the end of the answer.", ["route"], **made)
        self.first = Histogram("beholder_first_token_seconds", "Until the first piece of an answer.", **made)
        self.tokens = Counter("beholder_tokens_total", "Tokens read and written.", ["kind"], **made)
        self.rows = Histogram(
            "beholder_batch_rows", "Answers written together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **made
        )
        Gauge("beholder_waiting", "Answers that wait for the model.", **made).set_function(waiting)
        Gauge("beholder_running", "Answers that are being written.", **made).set_function(running)

    def answered(self, routes: Container[str], path: str, status: str, seconds: float) -> None:
        """Count an answer. What is none of the ``routes`` is one label: whoever asks must not make labels."""
        route = path if path in routes else "other"
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)
