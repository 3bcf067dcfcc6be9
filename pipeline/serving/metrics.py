"""Metrics of an ingress in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServiceMetrics:
    """
    Args:
        gauges: name and help of a gauge → its value now.
    """

    def __init__(self, gauges: dict[tuple[str, str], Callable[[], float]]):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mmap_clip_requests",
            "Requests by endpoint, model and status; 499: the client disconnected.",
            ("endpoint", "model", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "mmap_clip_request_seconds",
            "Seconds from the first byte of a request to its response, by endpoint and model.",
            ("endpoint", "model"),
            buckets=SECONDS,
            registry=registry,
        )
        self._rejected = Counter(
            "mmap_clip_rejected_requests", "Requests that a limit rejected, by reason.", ("reason",), registry=registry
        )
        self._images = Counter(
            "mmap_clip_images",
            "Images by model and outcome: predicted or broken.",
            ("model", "outcome"),
            registry=registry,
        )
        self._batch_size = Histogram(
            "mmap_clip_batch_images",
            "Images in the batch in which the model predicted those of a request.",
            ("model",),
            buckets=SIZES,
            registry=registry,
        )
        for (name, description), value in gauges.items():
            Gauge(name, description, registry=registry).set_function(value)

    def count_request(self, endpoint: str, model: str, status: int, seconds: float, reason: str | None) -> None:
        self._requests.labels(endpoint, model, str(status)).inc()
        self._seconds.labels(endpoint, model).observe(seconds)
        if reason:
            self._rejected.labels(reason).inc()

    def count_images(self, model: str, num_predicted: int, num_broken: int, batch_size: int) -> None:
        self._images.labels(model, "predicted").inc(num_predicted)
        self._images.labels(model, "broken").inc(num_broken)
        if num_predicted:
            self._batch_size.labels(model).observe(batch_size)

    def text(self) -> bytes:
        return generate_latest(self._registry)
