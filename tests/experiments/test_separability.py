"""The area under the ROC curve, against known answers and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from psa_vlm.experiments.separability import auroc, embed, probe, separation


def test_the_area_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60).astype(float), rng.random(60) < 0.4  # with ties
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert auroc(scores, np.ones(60, dtype=bool)) is None
    found = separation(scores, positive)
    assert found is not None and found.n == 60
    assert found.low < found.value < found.high and found.value == auroc(scores, positive)


def test_a_change_is_of_the_same_requests() -> None:
    rng = np.random.default_rng(1)
    positive = rng.random(200) < 0.5
    good = positive + rng.normal(0, 0.7, 200)
    change = separation(good, positive, against=good)
    assert change is not None and (change.low, change.value, change.high) == (0, 0, 0)
    worse = separation(rng.normal(size=200), positive, against=good)
    assert worse is not None and worse.high < 0


def test_a_probe_learns_what_is_linear() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(300, 4))
    labels = (features[:, 0] > 0).astype(float)
    right, wrong = probe(
        features[:200],
        labels[:200],
        [
            (features[200:], labels[200:]),
            (features[200:], 1 - labels[200:]),
        ],
    )
    assert right.value > 0.9 and right.n == 100
    assert wrong.value == pytest.approx(1 - right.value)


def test_the_same_seed_places_the_same() -> None:
    features = np.random.default_rng(3).normal(size=(12, 4))
    assert embed(features, 0).shape == (12, 2)
    assert (embed(features, 0) == embed(features, 0)).all()
