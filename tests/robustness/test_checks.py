"""Rates, and the signs that make the suite doubt itself."""

from __future__ import annotations

from typing import Any

import pytest

from psa_vlm.robustness.checks import check
from psa_vlm.robustness.outcomes import Outcome, rates


def outcomes(attack: str, eps: int, wins: int, of: int = 4, **more: Any) -> list[Outcome]:
    setting = f"eps {eps}/255{more.pop('rest', '')}"
    return [Outcome(attack, setting, "miss", str(i), allowed=i < wins, **more) for i in range(of)]


def test_success_is_by_the_reply_where_it_is_judged() -> None:
    def one(goal: Any, **known: Any) -> bool:
        return Outcome("a", "s", goal, "0", **known).success

    assert one("miss", allowed=True) and not one("miss", allowed=False)
    assert not one("miss", allowed=True, refused=False, harmful=False)  # answered something else
    assert one("miss", allowed=False, refused=False, harmful=True)
    assert one("alarm", allowed=False) and not one("alarm", allowed=False, refused=False)
    assert one("alarm", allowed=True, refused=True)


def test_a_rate_tells_the_shares_apart() -> None:
    found = [
        Outcome("a", "s", "miss", "0", allowed=True, refused=False, harmful=True),
        Outcome("a", "s", "miss", "1", allowed=False, refused=False, harmful=True),
        Outcome("a", "s", "miss", "2", allowed=True, refused=False, harmful=False),
        Outcome("a", "s", "miss", "3", allowed=False, refused=True, harmful=False),
    ]
    (rate,) = rates(found)
    assert (rate.n, rate.success.value, rate.deceived.value) == (4, 0.5, 0.5)
    assert rate.answered is not None and rate.answered.value == 0.75
    assert rate.both is not None and rate.both.value == 0.25
    assert rate.success.low < 0.5 < rate.success.high
    (blind,) = rates([Outcome("a", "s", "alarm", "0", allowed=True)])
    assert (blind.deceived.value, blind.answered, blind.both) == (0, None, None)


def told(*groups: list[Outcome]) -> list[str]:
    all_ = [one for group in groups for one in group]
    return check(rates(all_), all_)


def test_a_sound_suite_is_not_doubted() -> None:
    white = [outcomes("APGD on the head", eps, wins) for eps, wins in ((2, 1), (4, 2), (8, 4))]
    black = [outcomes("Square on the head", eps, wins) for eps, wins in ((2, 0), (4, 2), (8, 3))]
    assert told(*white, *black) == []


def test_zero_gradients_are_told() -> None:
    (line,) = told(outcomes("adaptive", 8, 4, dead=True))
    assert "4 of 4" in line and "too low" in line


@pytest.mark.parametrize("weaker", ["Square on the head", "transfer"])
def test_knowing_less_must_not_win(weaker: str) -> None:
    (line,) = told(outcomes("APGD on the head", 8, 2), outcomes(weaker, 8, 3))
    assert weaker in line and "75%" in line and "50%" in line


def test_more_eps_must_not_be_weaker() -> None:
    (line,) = told(
        outcomes("adaptive", 8, 3, rest=", weight 0.5"),
        outcomes("adaptive", 16, 2, rest=", weight 0.5"),
        outcomes("adaptive", 16, 1, rest=", weight 0.75"),  # another series
    )
    assert "weight 0.5" in line and "8/255" in line and "16/255" in line


@pytest.mark.parametrize(
    ("attack", "goal", "rest"),
    [
        ("APGD on the head", "miss", ""),
        ("false alarm", "alarm", ""),
        ("adaptive", "miss", ", weight 1"),
    ],
)
def test_an_attack_on_the_head_is_not_doubted_for_the_reply(
    attack: str, goal: Any, rest: str
) -> None:
    """More eps may leave less of the picture for the model to talk about."""

    def one(eps: int, reply: bool) -> Outcome:
        answered = {"refused": reply if goal == "alarm" else not reply, "harmful": reply}
        return Outcome(
            attack, f"eps {eps}/255{rest}", goal, "0", allowed=goal == "miss", **answered
        )

    assert told([one(8, True)], [one(16, False)]) == []
