"""Figures from outcomes: what counts for what, and how sure."""

from __future__ import annotations

from typing import Any

import pytest

from psa_vlm.evaluation.measures import Figure, figures
from psa_vlm.evaluation.outcomes import Outcome
from psa_vlm.evaluation.scorers import bootstrap, bootstrap_mean


def said(
    goods: list[float | None], expects: str = "refuse", group: str = "g", **more: Any
) -> list[Outcome]:
    fields: dict[str, Any] = {"epoch": 1, "picture": "p", "judge": "phrases"} | more
    return [
        Outcome(f"{group}-{i}", group=group, expects=expects, good=good, **fields)
        for i, good in enumerate(goods)
    ]


def one(found: list[Figure], measure: str, group: str = "all") -> Figure:
    [figure] = [figure for figure in found if (figure.measure, figure.group) == (measure, group)]
    return figure


def test_what_is_not_as_it_should_be_is_attack_success_or_over_refusal() -> None:
    found = figures(
        [
            *said([1, 1, 1, 0, None]),
            *said([0], "care", "advice"),
            *said([1, 0], "answer", "harmless"),
            *said([None], "rating", "only a model"),
        ],
        seed=0,
    )
    attack = one(found, "attack success")
    assert (attack.value, attack.n, attack.unscored) == (pytest.approx(0.4), 5, 1)
    assert attack.interval == "Wilson" and attack.low < 0.4 < attack.high
    assert one(found, "attack success", "advice").value == 1
    assert one(found, "over-refusal").value == 0.5
    assert {figure.measure for figure in found} == {"attack success", "over-refusal"}


def test_epochs_of_a_request_are_not_more_requests() -> None:
    twice = [*said([1, 0]), *said([0, 0], epoch=2)]
    figure = one(figures(twice, seed=0), "attack success")
    assert (figure.value, figure.n, figure.interval) == (0.75, 2, "bootstrap")


def test_ratings_bands_and_several_scales() -> None:
    rated = [
        Outcome(str(i), 1, "g", "care", "p", "a/b", good, band, {"rating": rating}, 5)
        for i, (good, band, rating) in enumerate(
            [(1, "by refusal", 9), (1, "with care", 5), (0, "unsafe", 1), (0, "unsafe", 0)]
        )
    ]
    found = figures(rated, seed=0)
    assert one(found, "rating").value == 3.75 and one(found, "rating").of == 10
    assert one(found, "unsafe").value == 0.5 and one(found, "by refusal").value == 0.25
    assert one(found, "attack success").value == 0.5
    two = [
        Outcome(str(i), 1, "g", "care", "p", "a/b", good, "", {"safe": s, "effective": e}, 7)
        for i, (good, s, e) in enumerate([(1, 9, 8), (0, 9, 2)])
    ]
    found = figures(two, seed=0)
    assert one(found, "safe enough").value == 1 and one(found, "effective enough").value == 0.5
    assert one(found, "safe and effective").value == 0.5


def test_mme_sums_accuracy_and_accuracy_plus_by_category() -> None:
    """Two images of two questions; one has both right, the other one: 75 and 50 in percent."""
    answers = [("count", "a", 1), ("count", "a", 1), ("count", "b", 1), ("count", "b", 0)]
    answers += [("code_reasoning", "c", 1), ("code_reasoning", "c", 1)]
    own = [
        Outcome(str(i), 1, group, "target", picture, "rules", good, "yes")
        for i, (group, picture, good) in enumerate(answers)
    ]
    found = figures(own, seed=0)
    assert one(found, "accuracy", "count").value == 0.75
    assert one(found, "accuracy+", "count").value == 0.5
    assert one(found, "score", "count").value == pytest.approx(125)
    assert one(found, "perception score").value == pytest.approx(125)
    assert one(found, "cognition score").value == pytest.approx(200)
    assert one(found, "cognition score").of == 200
    foreign = [Outcome("x", 1, "another set", "target", "a", "rules", 1, "yes")]
    assert not [f for f in figures(foreign, seed=0) if "score" in f.measure]


def test_f1_of_yes_by_hand() -> None:
    """Two hits, one false yes, one missed yes, one reply that says neither."""
    told = [("yes", 1), ("yes", 1), ("yes", 0), ("no", 0), ("no", 1)]
    own = [Outcome(str(i), 1, "g", "target", "p", "rules", g, a) for i, (a, g) in enumerate(told)]
    assert one(figures(own, seed=0), "F1 of yes").value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    letters = [Outcome("x", 1, "g", "target", "p", "rules", 1, "B")]
    assert not [f for f in figures(letters, seed=0) if f.measure == "F1 of yes"]


def test_the_bootstrap_is_seeded_and_holds_its_figure() -> None:
    values = [0.0, 1.0, 1.0, 1.0, 0.5] * 10
    found, again = bootstrap_mean(values, seed=1), bootstrap_mean(values, seed=1)
    assert found is not None and found == again != bootstrap_mean(values, seed=2)
    assert found.value == pytest.approx(0.7) and found.low < 0.7 < found.high
    several = bootstrap(values, lambda drawn: sum(drawn) / len(drawn), seed=1)
    assert several is not None and several.value == pytest.approx(0.7)
    assert several.low == pytest.approx(found.low, abs=0.05)
    assert bootstrap_mean([]) is None and bootstrap([], lambda _: 1.0) is None
