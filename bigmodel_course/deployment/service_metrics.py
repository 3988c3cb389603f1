"""What a worker counts, as Prometheus reads it: requests by route and status, their seconds, batches, who waits."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bigmodel_course.deployment.served_models import Served

__all__ = ["Metrics"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One application's metrics, in a registry of their own.

    A label takes few values: a route's pattern, never the path that a client made up, or each guess at a secret page
    would be a new series for ever.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, model: Served):
        self.registry = CollectorRegistry()
        shared = {"registry": self.registry}
        self.requests = Counter("service_requests", "Requests answered", ["route", "status"], **shared)
        self.seconds = Histogram("service_seconds", "From request to answer", ["route"], buckets=SECONDS, **shared)
        self.batch = Histogram("service_batch_rows", "Rows that ran together", buckets=ROWS, **shared)
        self.waiting = Gauge("service_waiting_rows", "Rows that wait for the model", **shared)
        info = Gauge("service_model", "What is served", ["name", "version", "sha256"], **shared)
        info.labels(model.name, model.version, model.sha256).set(1)

    def ended(self, scope: dict, status: int, seconds: float) -> None:
        """Count one request."""
        route = getattr(scope.get("route"), "path", "other")
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it, as /metrics answers."""
        return generate_latest(self.registry)
