"""Watch whether live requests still look like those that a calibration was made on."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from psa_vlm.errors import InputError
from psa_vlm.evaluation.risk_control import Array, scipy
from psa_vlm.model.calibration import Calibration

STEPS = 10
"""The window is looked at so many times while it fills anew."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drift:
    """A risk type whose live scores have left the calibration's.

    Attributes:
        type: its name.
        distance: the largest difference between the two cumulative distributions (0 to 1).
        limit: the distance that was allowed.
    """

    type: str
    distance: float
    limit: float


class DriftMonitor:
    """Compares the last scores of each risk type with those of the calibration samples.

    A Kolmogorov-Smirnov test of two samples on a sliding window: once it is full, every tenth of
    a window each type's distance is compared with a limit, the quantile of Kolmogorov's
    distribution at `false_alarms` / (10 x number of types). So while nothing has changed, the
    expected number of alarms for each window of new requests is `false_alarms` at most. Distances
    are taken at the stored quantiles of the calibration's scores, 101 for harmless and for risky
    samples.

    Args:
        calibration: what live scores are compared with.
        risky_share: how many of the live requests are risky when nothing has changed; None means
            as many as among the calibration samples.
        window: requests that are looked at together.
        false_alarms: alarms that are expected for each window while nothing has changed.

    Raises:
        InputError: a number is out of range.
        MissingExtra: scipy is not installed.
    """

    def __init__(
        self,
        calibration: Calibration,
        risky_share: float | None = None,
        window: int = 500,
        false_alarms: float = 0.01,
    ) -> None:
        total = calibration.samples["thresholds"]
        risky = sum(calibration.n[name] for name in calibration.thresholds)
        share = risky / total if risky_share is None else risky_share
        if window < STEPS:
            raise InputError(f"window is {window}: give {STEPS} requests or more")
        for name, value, most in (("risky_share", share, 1), ("false_alarms", false_alarms, 0.5)):
            if not 0 <= value <= most or (name == "false_alarms" and value == 0):
                raise InputError(f"{name} is {value}: give a number from 0 to {most}")
        self._references = {
            name: _Reference(np.array(one.harmless), np.array(one.risky), share)
            for name, one in calibration.scores.items()
        }
        self._live = {name: deque[float](maxlen=window) for name in self._references}
        self._added = 0
        self.window = window
        # As in the two-sample test: the variances of both samples add up.
        variance = 1 / window + share**2 / risky + (1 - share) ** 2 / (total - risky)
        level = false_alarms / (STEPS * len(self._references))
        self.limit = float(scipy("stats").kstwo.isf(level, round(1 / variance)))

    def add(self, scores: Mapping[str, float]) -> list[Drift]:
        """Take the scores of one request (`Verdict.scores`), and warn in the log about a drift.

        A verdict that failed has no scores and is left out.

        Returns:
            The types that have drifted, where this was the moment to look; else nothing.

        Raises:
            InputError: a type is missing, or a score is not a finite number.
        """
        if set(scores) != set(self._live):
            raise InputError(f"scores: give one for each of {', '.join(self._live)}")
        if not all(math.isfinite(score) for score in scores.values()):
            raise InputError("scores: not a finite number")
        for name, score in scores.items():
            self._live[name].append(score)
        self._added += 1
        if self._added < self.window or self._added % math.ceil(self.window / STEPS):
            return []
        drifts = []
        for name, reference in self._references.items():
            distance = reference.distance(np.array(self._live[name]))
            if distance > self.limit:
                drifts.append(Drift(name, distance, self.limit))
                _logger.warning(
                    "the scores of %s have left the calibration's: distance %.3f, allowed %.3f;"
                    " the promised miss rate may not hold: calibrate again",
                    *(name, distance, self.limit),
                )
        return drifts


@dataclass(frozen=True)
class _Reference:
    """Quantiles of harmless and of risky scores, mixed by the share of the risky."""

    harmless: Array
    risky: Array
    risky_share: float

    def distance(self, live: Array) -> float:
        at = np.concatenate([self.harmless, self.risky])
        expected = (1 - self.risky_share) * _cumulative(self.harmless, at)
        expected = expected + self.risky_share * _cumulative(self.risky, at)
        return float(np.abs(_cumulative(live, at) - expected).max())


def _cumulative(values: Array, at: Array) -> Array:
    """The share of values up to each point."""
    counts: Array = np.searchsorted(np.sort(values), at, side="right") / len(values)
    return counts
