"""The suite checks itself: signs that an attack is weaker than it looks, each with its explanation.

The signs are those by which broken evaluations of defences were found out (Athalye et al. 2018,
arXiv:1802.00420; Carlini et al. 2019, arXiv:1902.06705).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from psa_vlm.robustness.outcomes import Outcome, Rate

WHITE = "APGD on the head"
WEAKER = ("Square on the head", "transfer")
"""Attacks that know less than `WHITE` does, and so should not beat it."""


def check(rates: Sequence[Rate], outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each sign that was found; none is no proof that all is well."""
    return [*_dead(outcomes), *_beaten(rates), *_weaker(rates)]


def _dead(outcomes: Sequence[Outcome]) -> Iterator[str]:
    attacks: dict[str, list[bool]] = {}
    for one in outcomes:
        attacks.setdefault(f"{one.attack}, {one.setting}", []).append(one.dead)
    for name, dead in attacks.items():
        if any(dead):
            yield (
                f"{name}: at {sum(dead)} of {len(dead)} images the first gradient was zero"
                " everywhere. The attack could not begin there, so its rate is too low: something"
                " on the way is saturated or does not pass gradients."
            )


def _beaten(rates: Sequence[Rate]) -> Iterator[str]:
    white = {rate.setting: rate for rate in rates if rate.attack == WHITE}
    for rate in rates:
        best = white.get(rate.setting)
        if rate.attack in WEAKER and best and rate.deceived.value > best.deceived.value:
            yield (
                f"{rate.attack}, {rate.setting}: deceived the head in {rate.deceived.value:.0%} of"
                f" requests, {WHITE} in {best.deceived.value:.0%}. An attack that knows less should"
                " not do better: the gradients mislead, or the white-box attack needs more steps."
            )


def _weaker(rates: Sequence[Rate]) -> Iterator[str]:
    series: dict[tuple[str, str], list[tuple[float, Rate]]] = {}
    for rate in rates:
        if found := re.match(r"eps (\d+)/255(.*)", rate.setting):
            series.setdefault((rate.attack, found[2]), []).append((float(found[1]), rate))
    for (attack, rest), found_rates in series.items():
        for (low, weak), (high, strong) in pairwise(sorted(found_rates, key=lambda one: one[0])):
            before, after = _aim(weak), _aim(strong)
            if after < before:
                yield (
                    f"{attack}{rest}: reaches its aim in {before:.0%} at eps {low:g}/255 but in"
                    f" {after:.0%} at {high:g}/255. Whatever is allowed at the smaller eps is"
                    " allowed at the larger, so the search stopped too early there: take the larger"
                    " rate for both, and give more steps or restarts."
                )


def _aim(rate: Rate) -> float:
    """What an attack searches for; on the head that is its word, whatever the reply is then."""
    whole = rate.attack == "adaptive" and not rate.setting.endswith("weight 1")
    return (rate.success if whole else rate.deceived).value
