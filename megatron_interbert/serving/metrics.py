"""Collect the service's metrics for Prometheus."""

import prometheus_client as prometheus

from megatron_interbert.serving.connections import Crowd
from megatron_interbert.serving.service import Service


class Metrics:
    """Hold the Prometheus metrics of one application."""

    def __init__(self, service: Service, crowd: Crowd) -> None:
        self.registry = prometheus.CollectorRegistry()
        make = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "interbert_requests", "requests by route and status", ["route", "status"], **make
        )
        self.seconds = prometheus.Histogram(
            "interbert_request_seconds",
            "duration of requests in seconds",
            ["route"],
            **make,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )

        for name, what in (
            ("batches", "batches of questions"),
            ("questions", "questions answered"),
            ("late", "questions past their deadline"),
            ("gone", "questions whose clients left"),
            ("full", "questions rejected by a full queue"),
        ):
            gauge = prometheus.Gauge(f"interbert_{name}_total", f"total {what}", **make)
            gauge.set_function(
                lambda name=name: sum(thread.answered[name] for thread in service.threads)
            )

        waiting = prometheus.Gauge("interbert_waiting", "questions in the queue", **make)
        waiting.set_function(lambda: sum(thread.waiting for thread in service.threads))
        prometheus.Gauge("interbert_items", "items", **make).set_function(
            lambda: len(service.searcher.shop.items)
        )
        prometheus.Gauge("interbert_connections", "open connections", **make).set_function(
            lambda: crowd.open
        )
        ended = prometheus.Gauge(
            "interbert_connections_ended_total",
            "connections closed by the service",
            ["reason"],
            **make,
        )
        for reason in crowd.ended:
            ended.labels(reason).set_function(lambda reason=reason: crowd.ended[reason])

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
