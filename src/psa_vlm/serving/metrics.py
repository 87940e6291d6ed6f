"""What the service counts, for Prometheus. No tenant and no word of a request is among it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

if TYPE_CHECKING:
    from psa_vlm.serving.engine import Engine


class Metrics:
    """Counters of one service, in a registry of their own.

    Attributes:
        requests: by endpoint and HTTP status.
        seconds: until the end of a response, by endpoint.
        decisions: that were recorded, by endpoint and action.
        failures: requests that ended without a whole reply, by endpoint and error code.
        reloads: of the policy, by outcome: "ok" or "refused".
        drifts: looks at which a risk type's scores had left the calibration's, by type.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "psa_requests", "HTTP requests.", ["endpoint", "status"], registry=own
        )
        self.seconds = Histogram(
            "psa_request_seconds", "Time of a request.", ["endpoint"], registry=own
        )
        self.decisions = Counter(
            "psa_decisions", "Decisions on record.", ["endpoint", "action"], registry=own
        )
        self.failures = Counter(
            "psa_failures", "Requests without a whole reply.", ["endpoint", "code"], registry=own
        )
        self.reloads = Counter(
            "psa_policy_reloads", "Times that the policy was read anew.", ["outcome"], registry=own
        )
        self.drifts = Counter(
            "psa_drifts", "Times that scores had left the calibration's.", ["type"], registry=own
        )
        waiting = Gauge("psa_waiting", "Requests that wait for the model.", registry=own)
        waiting.set_function(lambda: engine.waiting)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
