"""The drift monitor is silent while nothing changes and speaks when something does."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest

from psa_vlm.errors import InputError
from psa_vlm.evaluation.drift import DriftMonitor
from psa_vlm.taxonomy import Taxonomy

TYPES = Taxonomy.default().risk_types


def feed(monitor: DriftMonitor, draws: np.ndarray) -> list[str]:
    """Types that drifted, one entry for each alarm; draws ``[requests, types]``."""
    found = []
    for row in draws:
        found += [one.type for one in monitor.add(dict(zip(TYPES, row.tolist(), strict=True)))]
    return found


@pytest.mark.parametrize("false_alarms", [0.01, 0.5])
def test_false_alarms_are_as_rare_as_stated(make_calibration: Any, false_alarms: float) -> None:
    monitor = DriftMonitor(make_calibration(), window=100, false_alarms=false_alarms)
    windows = 40
    draws = np.random.default_rng(0).random((100 * windows, len(TYPES)))
    expected = windows * false_alarms
    assert len(feed(monitor, draws)) <= expected + 4 * math.sqrt(10 * expected)  # looks overlap


def test_a_shift_of_one_type_is_found_within_a_window_and_named(
    make_calibration: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = DriftMonitor(make_calibration(), window=200)
    rng = np.random.default_rng(1)
    assert not feed(monitor, rng.random((400, len(TYPES))))
    shifted = rng.random((200, len(TYPES)))
    shifted[:, TYPES.index("privacy")] **= 3
    with caplog.at_level(logging.WARNING):
        assert set(feed(monitor, shifted)) == {"privacy"}
    assert "privacy" in caplog.text and "calibrate again" in caplog.text


def test_nothing_is_said_before_the_window_is_full(make_calibration: Any) -> None:
    monitor = DriftMonitor(make_calibration(), window=200)
    assert not feed(monitor, np.ones((199, len(TYPES))))
    assert feed(monitor, np.ones((1, len(TYPES)))) == list(TYPES)


def test_live_requests_may_be_rarely_risky(make_calibration: Any) -> None:
    """60% of the calibration samples are risky, 2% of the requests: no drift once it is said."""
    low, high = np.linspace(0, 0.3, 101).tolist(), np.linspace(0.7, 1, 101).tolist()
    scores = {name: {"harmless": low, "risky": high} for name in TYPES}
    calibration = make_calibration(scores=scores)
    rng = np.random.default_rng(2)
    risky = rng.random((300, 1)) < 0.02
    draws = 0.3 * rng.random((300, len(TYPES))) + 0.7 * risky
    assert feed(DriftMonitor(calibration, window=200), draws)
    assert not feed(DriftMonitor(calibration, risky_share=0.02, window=200), draws)


@pytest.mark.parametrize(
    "wrong", [{"window": 5}, {"false_alarms": 0}, {"false_alarms": 0.9}, {"risky_share": 1.5}]
)
def test_numbers_out_of_range_are_refused(make_calibration: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DriftMonitor(make_calibration(), **wrong)


def test_scores_that_are_missing_or_no_numbers_are_refused(make_calibration: Any) -> None:
    monitor = DriftMonitor(make_calibration())
    with pytest.raises(InputError, match="one for each of"):
        monitor.add({})
    with pytest.raises(InputError, match="finite"):
        monitor.add(dict.fromkeys(TYPES, math.nan))
