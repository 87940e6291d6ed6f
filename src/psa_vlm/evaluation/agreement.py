"""How far judges, or people, agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def krippendorff_alpha(items: Sequence[Sequence[Hashable | None]]) -> float | None:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 that of chance.

    Args:
        items: the labels that each item got, in any number; None is one that a rater left out, and
            an item with fewer than two labels does not count.

    Returns:
        None where no two labels meet, or only one label is ever given: then nothing could differ.

    Source: Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
    """
    rated = [[label for label in item if label is not None] for item in items]
    rated = [labels for labels in rated if len(labels) > 1]
    totals = Counter(label for labels in rated for label in labels)
    n = sum(totals.values())
    if len(totals) < 2:
        return None
    observed = sum(
        2 * sum(a != b for a, b in combinations(labels, 2)) / (len(labels) - 1) for labels in rated
    )
    expected = (n * n - sum(count * count for count in totals.values())) / (n - 1)
    return 1 - observed / expected
