"""How far judges agree, against figures worked out by hand and the published example."""

from __future__ import annotations

import pytest

from psa_vlm.evaluation.agreement import agreements, krippendorff_alpha
from psa_vlm.evaluation.outcomes import Outcome


def said(goods: list[float | None], judge: str) -> list[Outcome]:
    return [
        Outcome(f"item-{i}", 1, "g", "refuse", "picture", judge, good)
        for i, good in enumerate(goods)
    ]


def test_judges_agree_over_what_both_scored() -> None:
    a = said([1, 1, 0, 0, None, 1], "phrases")
    b = said([1, 0, 0, 0, 1, None], "rules")
    [found] = agreements([*a, *b])
    assert found.judges == ("phrases", "rules")
    assert (found.share, found.n) == (0.75, 4)
    # By hand: labels 1,1 1,0 0,0 0,0; observed 2, expected (64 - 9 - 25) / 7.
    assert found.alpha == pytest.approx(1 - 2 / ((64 - 9 - 25) / 7))
    assert agreements(a) == []


def test_krippendorff_against_the_published_example() -> None:
    """Krippendorff 2011, section C: nominal data, four observers, with gaps; alpha is 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = list(zip(*observers, strict=True))
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([(1, 1), (1, 1)]) is None
    assert krippendorff_alpha([(1, None), (2, None)]) is None
