"""The mathematics of a calibration: temperatures, and thresholds with a finite-sample bound.

A threshold is an order statistic of the scores that it may get wrong. Of n independent scores put
in order, the k+1-st leaves a share of the whole distribution beyond it that exceeds `rate` with
probability P(Bin(n, rate) <= k) at most, whatever the distribution is (Wilks 1941; less with ties).
So k is the largest number for which this is 1 - confidence or less. In the words of Bates et al.,
"Distribution-free, risk-controlling prediction sets" (arXiv 2101.02703), it is the threshold up to
which the exact binomial (Clopper-Pearson) upper bound of a monotone risk stays below `rate`; the
fixed-sequence test of "Learn then Test" (Angelopoulos et al., arXiv 2110.01052) with exact p-values
ends at the same place.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np

from psa_vlm.errors import DataError, MissingExtra

Array = np.ndarray[Any, np.dtype[np.float64]]

HOTTEST = 20.0
"""Temperatures are looked for between this and its inverse."""


def needed(rate: float, confidence: float) -> int:
    """The fewest samples from which any threshold can be promised: 299 for 0.01 at 0.95."""
    return math.ceil(math.log1p(-confidence) / math.log1p(-rate))


def allowed(n: int, rate: float, confidence: float) -> int:
    """How many of n samples may lie beyond a threshold; -1 if there are too few samples."""
    binom = scipy("stats").binom
    k = int(binom.ppf(1 - confidence, n, rate))
    return k if binom.cdf(k, n, rate) <= 1 - confidence else k - 1


def lower_threshold(scores: Array, rate: float, confidence: float) -> float:
    """The highest threshold with P(share of scores below it > rate) <= 1 - confidence.

    Args:
        scores: ``[n]``, independent draws.

    Raises:
        DataError: there are fewer than `needed`.
    """
    k = allowed(len(scores), rate, confidence)
    if k < 0:
        wanted = needed(rate, confidence)
        raise DataError(f"{len(scores)} samples are too few; at least {wanted} are needed")
    return float(np.sort(scores)[k])


def upper_threshold(scores: Array, rate: float, confidence: float) -> float:
    """The lowest threshold with P(share of scores above it > rate) <= 1 - confidence."""
    return -lower_threshold(-scores, rate, confidence)


def temperature(logits: Array, labels: np.ndarray) -> float:
    """What to divide logits by, so that their softmax has the least negative log-likelihood.

    After Guo et al., "On calibration of modern neural networks" (arXiv 1706.04599).

    Args:
        logits: ``[n, classes]``; logarithms of probabilities will do.
        labels: ``[n]`` class ids.
    """
    found = scipy("optimize").minimize_scalar(
        lambda log: negative_log_likelihood(logits / math.exp(log), labels),
        bounds=(-math.log(HOTTEST), math.log(HOTTEST)),
        method="bounded",
    )
    fitted = math.exp(found.x)
    return min((fitted, 1.0), key=lambda t: negative_log_likelihood(logits / t, labels))


def negative_log_likelihood(logits: Array, labels: np.ndarray) -> float:
    """Mean over the samples, in nats; arguments are those of `temperature`."""
    return float(-np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def scipy(module: str) -> Any:
    """A module of scipy, `stats`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise MissingExtra("scipy", "eval") from error
