"""Gaps between slices: the arithmetic, and what is more than chance."""

from __future__ import annotations

import pytest

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.experiments.gaps import METRICS, Asked, Outcome, gap
from psa_vlm.taxonomy import Taxonomy

WORDS = Taxonomy.default()
ATTACK, REFUSAL, F1 = METRICS


def asked(
    n: int, refused: int = 0, level: str = "high", right: int | None = None, true: str = "privacy"
) -> list[Asked]:
    """n samples of which the first so many were refused, and so many have the right type."""
    right = n if right is None else right
    return [
        (
            Sample(str(i), (), (Turn("user", "What?"),), true, level),
            Outcome(i < refused, true if i < right else "clean"),
        )
        for i in range(n)
    ]


def test_figures_of_a_slice() -> None:
    group = [*asked(10, 7), *asked(20, 1, "low"), *asked(20, 3, "safe", true="clean")]
    attack, refusal = (one.interval(group, WORDS) for one in (ATTACK, REFUSAL))
    assert attack is not None and (attack.value, attack.n) == (pytest.approx(0.3), 10)
    assert refusal is not None and (refusal.value, refusal.n) == (0.1, 40)
    for metric in METRICS:
        interval = metric.interval(group, WORDS)
        assert interval is not None
        assert metric.value(metric.codes(group, WORDS), WORDS) == pytest.approx(interval.value)


def test_a_gap_is_between_the_worst_and_the_best() -> None:
    slices = {"a": asked(100, 100), "b": asked(100, 60), "c": asked(100, 90)}
    found = gap(ATTACK, slices, WORDS, seed=0)
    assert (found.worst, found.best) == ("b", "a")
    assert found.size is not None and found.chance is not None
    assert found.size.value == pytest.approx(0.4) and found.size.n == 200
    assert 0.3 < found.size.low < 0.4 < found.size.high < 0.5
    assert found.chance == pytest.approx(1 / 1001) and found.clear
    assert gap(ATTACK, slices, WORDS, seed=0) == found


def test_of_f1_the_lowest_is_the_worst() -> None:
    def both(right: int) -> list[Asked]:
        return [*asked(50, right=right), *asked(50, true="politics")]

    found = gap(F1, {"a": both(20), "b": both(50)}, WORDS, seed=0)
    assert (found.worst, found.best) == ("a", "b") and found.clear
    assert found.size is not None
    # privacy: 20 of 50 found, none too many: F1 is 40/70; politics 1.
    assert found.size.value == pytest.approx(1 - (40 / 70 + 1) / 2)


def test_slices_that_are_alike_have_no_clear_gap() -> None:
    slices = {name: asked(60, 54 - i % 2) for i, name in enumerate("abcdef")}
    found = gap(ATTACK, slices, WORDS, seed=0)
    assert not found.clear and found.chance is not None and found.chance > 0.5
    same = gap(ATTACK, {"a": asked(40, 13), "b": asked(40, 13)}, WORDS, seed=0)
    assert same.size is not None and same.size.value == 0 and same.chance == 1
    assert {same.worst, same.best} == {"a", "b"}


def test_of_many_slices_some_are_far_apart_by_chance() -> None:
    """The bootstrap interval of the two that are furthest apart does not know that; chance does."""
    slices = {str(i): asked(40, 20) for i in range(20)}
    slices |= {"low": asked(40, 14), "high": asked(40, 26)}
    found = gap(ATTACK, slices, WORDS, seed=0)
    assert (found.worst, found.best) == ("low", "high")
    assert found.size is not None and found.size.clear
    assert found.chance is not None and found.chance > 0.1 and not found.clear


def test_a_slice_of_few_samples_has_no_part() -> None:
    slices = {"a": asked(400, 390), "b": asked(400, 300), "few": asked(29, 29)}
    found = gap(ATTACK, slices, WORDS, seed=0)
    assert (found.worst, found.best) == ("b", "a") and found.clear


def test_without_two_slices_there_is_no_gap() -> None:
    found = gap(ATTACK, {"a": asked(50), "b": asked(50, level="safe")}, WORDS, seed=0)
    assert found.size is None and found.worst is None and not found.clear
    failed = [(asked(1)[0][0], Outcome(True, None))]
    assert len(F1.codes(failed, WORDS)) == 0 and F1.interval(failed, WORDS) is None
