"""How far judges, or people, agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict

from psa_vlm.evaluation.outcomes import Outcome
from psa_vlm.evaluation.scorers import wilson


class Agreement(BaseModel):
    """How far two judges agree on whether replies did what they should.

    `share` of the `n` replies that both scored; `alpha` is Krippendorff's, null where it has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judges: tuple[str, str]
    share: float
    low: float
    high: float
    alpha: float | None
    n: int

    def __str__(self) -> str:
        alpha = "not defined" if self.alpha is None else f"{self.alpha:.2f}"
        share, low, high = (f"{100 * one:.1f}" for one in (self.share, self.low, self.high))
        return (
            f"{self.judges[0]} and {self.judges[1]} agree on {share}% ({low}-{high}) of {self.n}; "
            f"Krippendorff's alpha {alpha}"
        )


def agreements(found: Sequence[Outcome]) -> list[Agreement]:
    """How far each two judges agree, over the replies that both scored."""
    said: dict[str, dict[tuple[str, int], float]] = {}
    for one in found:
        if one.good is not None:
            said.setdefault(one.judge, {})[one.item, one.epoch] = one.good
    made = []
    for a, b in combinations(said, 2):
        shared = [key for key in said[a] if key in said[b]]
        pairs = [(said[a][key], said[b][key]) for key in shared]
        interval = wilson([one == other for one, other in pairs])
        if interval is not None:
            alpha = krippendorff_alpha(pairs)
            made.append(
                Agreement(
                    judges=(a, b),
                    share=interval.value,
                    low=interval.low,
                    high=interval.high,
                    alpha=alpha,
                    n=interval.n,
                )
            )
    return made


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
