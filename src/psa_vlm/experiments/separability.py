"""How well features or scores tell classes apart: linear probes, t-SNE, area under a ROC curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psa_vlm.errors import MissingExtra
from psa_vlm.evaluation.risk_control import Array, scipy
from psa_vlm.evaluation.scorers import Interval, bootstrap, wilson

Bools = np.ndarray[Any, np.dtype[np.bool_]]


def probe(train: Array, labels: Array, tests: Sequence[tuple[Array, Array]]) -> list[Interval]:
    """How often a linear probe is right on each test set, with Wilson's interval.

    A logistic regression (L2, C = 1, as scikit-learn has it by default) on standardised features.

    Args:
        train: ``[n, D]``.
        labels: class ids ``[n]``.
        tests: features and labels of each.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("scikit-learn", "eval") from error
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, labels)
    found = []
    for features, truth in tests:
        interval = wilson((fitted.predict(features) == truth).tolist())
        assert interval is not None
        found.append(interval)
    return found


def embed(features: Array, seed: int) -> Array:
    """t-SNE of standardised features ``[n, D]`` -> ``[n, 2]``.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("scikit-learn", "eval") from error
    perplexity = min(30.0, (len(features) - 1) / 3)
    placed: Array = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        StandardScaler().fit_transform(features)
    )
    return placed


def auroc(scores: Array, positive: Bools) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties half.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bools.

    Returns:
        None where one of the two is missing.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    ranks = scipy("stats").rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def separation(
    scores: Array, positive: Bools, against: Array | None = None, draws: int = 1000
) -> Interval | None:
    """`auroc` with a bootstrap interval, or by how much it is better than that of other scores."""

    def statistic(rows: Sequence[int]) -> float | None:
        area = auroc(scores[list(rows)], positive[list(rows)])
        if area is None or against is None:
            return area
        return area - (auroc(against[list(rows)], positive[list(rows)]) or 0.0)

    return bootstrap(range(len(scores)), statistic, draws=draws)
