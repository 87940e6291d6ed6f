"""Refusing by the verdict alone: the same as a policy would, and thresholds that spend no more."""

from __future__ import annotations

import numpy as np
import pytest

from psa_vlm.experiments.thresholds import (
    RISKY,
    SCORES,
    Outcome,
    Way,
    curve,
    halves,
    likeliest_refused,
    operating,
    policy_score,
    same_spend,
    ways_to_refuse,
)
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy

WORDS = Taxonomy.default()


def image(rng: np.random.Generator) -> ImageVerdict:
    types, levels = rng.dirichlet([0.4] * 7), rng.dirichlet([0.5] * 4)
    return ImageVerdict(
        dict(zip(WORDS.types, types.tolist(), strict=True)),
        dict(zip(WORDS.levels, levels.tolist(), strict=True)),
    )


def outcome(kind: str, risk: float, refused: bool = False, high: float = 1.0) -> Outcome:
    """Of one type with probability ``risk``, at level high or low with what is left of it."""
    types = dict.fromkeys(WORDS.types, 0.0) | {"privacy": risk, "clean": 1 - risk}
    levels = dict.fromkeys(WORDS.levels, 0.0) | {"high": high, "low": 1 - high}
    return Outcome(kind, "high" if kind == RISKY else "safe", False, refused, types, levels)


def test_the_hand_set_rule_and_the_score_are_those_of_the_policy_strict() -> None:
    rng, strict = np.random.default_rng(0), Policy.shipped("strict")
    for _ in range(200):
        one = image(rng)
        verdict = Verdict.from_probs([one], WORDS)
        refused = strict.decide(verdict, WORDS).action == "refuse"
        assert likeliest_refused(one, WORDS) == refused
        for threshold in (0.01, 0.1, 0.3, float(rng.random())):
            limits = dict.fromkeys(WORDS.risk_types, threshold)
            policy = strict.model_copy(update={"thresholds": limits})
            refused = policy.decide(verdict, WORDS).action == "refuse"
            assert (policy_score(one, WORDS) >= threshold) == refused


def test_the_same_spend_lets_no_more_through() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.7])
    assert [same_spend(scores, spent) for spent in range(4)] == [0.9, 0.7, 0.5, 0.1]
    assert (scores > same_spend(scores, 2)).sum() == 2
    assert (np.array([0.5, 0.5, 0.5]) > same_spend(np.array([0.5, 0.5, 0.5]), 1)).sum() == 0


def test_both_halves_have_every_kind_and_nothing_is_in_both() -> None:
    found = [outcome(kind, i / 10) for kind in (RISKY, "plain") for i in range(10)]
    one, two = halves(found)
    assert [o.kind for o in one] == [o.kind for o in two] == [RISKY] * 5 + ["plain"] * 5
    assert {id(o) for o in one}.isdisjoint({id(o) for o in two})


def test_a_threshold_buys_misses_back_at_the_same_spend() -> None:
    """Half of the risky have P(type) 0.4, which the most probable type misses and 0.3 does not."""
    harmless = [outcome("plain", i / 400) for i in range(100)]
    risky = [outcome(RISKY, 0.4 if i % 2 else 0.9) for i in range(40)]
    ways, lacking = ways_to_refuse(harmless, [*harmless, *risky], WORDS)
    is_risky = np.array([False] * 100 + [True] * 40)
    by_name = {way.name: way for way in ways}
    hand_set = ways[0]
    assert hand_set.misses(is_risky).value == 0.5 and hand_set.false_refusals(is_risky).value == 0
    same = by_name["policy thresholds: same spend"]
    assert same.threshold == pytest.approx(99 / 400)
    assert same.misses(is_risky).value == 0 and same.false_refusals(is_risky).value == 0
    change = same.saves(hand_set, is_risky)
    assert change.value == 0.5 and change.clear and change.n == 40
    promised = by_name["policy thresholds: at most 5%"]
    assert promised.false_refusals(is_risky).value == 0.01  # of 100 the bound allows one
    assert lacking == ["100 harmless requests are too few to promise 1%; it takes 299."]


def test_the_run_is_seen_by_its_replies() -> None:
    found = [outcome(RISKY, 0.9, refused=i < 3) for i in range(4)]
    found += [outcome("plain", 0.1, refused=i < 1) for i in range(80)]
    ways, _ = ways_to_refuse(found, found, WORDS)
    is_risky = np.array([one.risky for one in found])
    assert ways[1].misses(is_risky).value == 0.25
    assert ways[1].false_refusals(is_risky).value == 1 / 80


@pytest.mark.parametrize("name", SCORES)
def test_a_curve_trades_one_for_the_other(name: str) -> None:
    rng = np.random.default_rng(1)
    found = [outcome(RISKY, p, high=h) for p, h in rng.beta(3, 1, (50, 2)).tolist()]
    found += [outcome("plain", p, high=h) for p, h in rng.beta(1, 3, (70, 2)).tolist()]
    line = curve(found, SCORES[name], WORDS)
    limits, refused, missed = zip(*line, strict=True)
    assert list(limits) == sorted(limits)
    assert [one.value for one in refused] == sorted((one.value for one in refused), reverse=True)
    assert [one.value for one in missed] == sorted(one.value for one in missed)
    assert refused[-1].value == 0 and missed[-1].value == 1
    assert refused[0].n == 70 and missed[0].n == 50


def test_the_figure_marks_every_way_on_the_curves() -> None:
    found = [outcome(RISKY, 0.9) for _ in range(4)] + [outcome("plain", 0.1) for _ in range(70)]
    ways, _ = ways_to_refuse(found, found, WORDS)
    figure = operating(ways, found, WORDS)
    lines = [one["name"] for one in figure["data"] if one["mode"] == "lines"]
    marks = {one["name"]: one for one in figure["data"] if one["mode"] == "markers"}
    assert lines == list(SCORES) and list(marks) == [way.name for way in ways]
    assert (marks[ways[0].name]["x"], marks[ways[0].name]["y"]) == ([0.0], [0.0])
    colours = {way.name: marks[way.name]["marker"]["color"] for way in ways}
    assert colours[ways[2].name] == figure["data"][0]["line"]["color"]
    assert colours[ways[-1].name] == figure["data"][1]["line"]["color"]


def test_a_way_compared_with_itself_changes_nothing() -> None:
    way = Way("x", None, np.array([True, False, True]))
    change = way.saves(way, np.array([True, True, False]))
    assert (change.value, change.low, change.high, change.clear) == (0, 0, 0, False)
