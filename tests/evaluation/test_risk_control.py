"""Thresholds keep what they promise on distributions whose truth is known."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from psa_vlm.errors import DataError, MissingExtra
from psa_vlm.evaluation.risk_control import (
    allowed,
    log_softmax,
    lower_threshold,
    needed,
    negative_log_likelihood,
    temperature,
    upper_threshold,
)

RESAMPLES = 800


def tolerance(share: float) -> float:
    """Four standard errors of a share over the resamples."""
    return float(4 * (share * (1 - share) / RESAMPLES) ** 0.5)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_the_number_needed_is_the_fewest_that_do(rate: float, confidence: float) -> None:
    n = needed(rate, confidence)
    assert allowed(n, rate, confidence) >= 0 > allowed(n - 1, rate, confidence)
    assert needed(0.01, 0.95) == 299 and needed(0.05, 0.95) == 59


def test_too_few_samples_name_both_numbers() -> None:
    with pytest.raises(DataError, match=r"298 samples are too few; at least 299"):
        lower_threshold(np.zeros(298), 0.01, 0.95)


@pytest.mark.parametrize(("n", "rate", "confidence"), [(299, 0.01, 0.95), (700, 0.03, 0.9)])
def test_the_promise_holds_and_is_not_given_away(n: int, rate: float, confidence: float) -> None:
    rng = np.random.default_rng(0)
    uniform = rng.random((RESAMPLES, n))  # the share below a threshold is the threshold
    low = np.array([lower_threshold(scores, rate, confidence) for scores in uniform])
    high = np.array([upper_threshold(scores, rate, confidence) for scores in uniform])
    for missed in (low, 1 - high):
        broken = float(np.mean(missed > rate))
        assert broken <= 1 - confidence + tolerance(1 - confidence)
        # One more error would break it: the bound is the sharpest that there is.
        k = allowed(n, rate, confidence)
        assert missed.mean() == pytest.approx((k + 1) / (n + 1), rel=0.1)
    one_more = np.sort(uniform, 1)[:, allowed(n, rate, confidence) + 1]
    assert float(np.mean(one_more > rate)) > 1 - confidence


def test_the_promise_holds_with_ties() -> None:
    rng = np.random.default_rng(1)
    draws = rng.integers(0, 40, (RESAMPLES, 400))  # a threshold of v has v / 40 below it
    missed = np.array([lower_threshold(scores, 0.05, 0.9) for scores in draws]) / 40
    assert float(np.mean(missed > 0.05)) <= 0.1 + tolerance(0.1)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_and_lowers_the_loss(true: float) -> None:
    rng = np.random.default_rng(2)
    honest = log_softmax(rng.normal(size=(4000, 5)) * 2)
    labels = np.array([rng.choice(5, p=np.exp(row)) for row in honest])
    found = temperature(honest * true, labels)
    assert found == pytest.approx(true, rel=0.1)
    before = negative_log_likelihood(honest * true, labels)
    after = negative_log_likelihood(honest * true / found, labels)
    assert after <= before
    if true != 1.0:
        assert after < before - 0.01


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtra, match=r"psa-vlm\[eval\]"):
        allowed(10, 0.1, 0.9)
