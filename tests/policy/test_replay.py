"""What a new policy would have changed, told from records and never guessed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.policy.replay import replay, view
from psa_vlm.taxonomy import Taxonomy

WORDS = Taxonomy.default()
OLD = Policy.from_text("name: old\ninherits: strict\ntenants: {school: {off: [privacy]}}\n")


def verdict(*found: tuple[str, str], sure: float = 0.9) -> Verdict:
    """One image for each type and level."""

    def spread(name: str, names: tuple[str, ...]) -> dict[str, float]:
        rest = (1 - sure) / (len(names) - 1)
        return {one: sure if one == name else rest for one in names}

    images = [
        ImageVerdict(spread(t, WORDS.types), spread(level, WORDS.levels)) for t, level in found
    ]
    return Verdict.from_probs(images, WORDS)


def record(
    seen: Verdict | None, request: str = "r", tenant: str | None = None, policy: Policy = OLD
) -> dict[str, Any]:
    """As the service writes it."""
    rules = policy if tenant is None else policy.for_tenant(tenant)
    told = {"action": "allow", "rule": "no-image", "type": None, "level": None, "reason": None}
    if seen is not None:
        decided = rules.decide(seen, WORDS).to_dict()
        told = {name: decided[name] for name in told}
    written = {
        "request": request,
        "time": "2026-01-02T03:04:05.000006+00:00",
        "tenant": tenant,
        "scores": {"privacy": 0.5},
        "verdict": None if seen is None else seen.to_dict(),
        "decision": told,
        "error": None,
    }
    return json.loads(json.dumps(written))  # type: ignore[no-any-return]


RECORDS = [
    record(verdict(("privacy", "high")), "a"),
    record(verdict(("clean", "safe"), ("privacy", "high")), "b"),
    record(verdict(("privacy", "high")), "c", "school"),
    record(verdict(("fairness", "low")), "d"),
    record(verdict(("clean", "safe")), "e"),
    record(None, "f"),
    record(Verdict.failed("not finite"), "g"),
]
SAME = "name: new\ninherits: strict\ntenants: {school: {off: [privacy]}}\n"


def test_the_same_rules_change_nothing() -> None:
    found = replay(RECORDS, Policy.from_text(SAME), WORDS)
    assert (found.records, found.same, found.changes, found.apart) == (7, 7, [], {})


def test_changes_are_counted_by_what_was_and_what_would_be() -> None:
    new = Policy.from_text(SAME + "rules: {privacy: {high: hint}, fairness: {low: refuse}}\n")
    found = replay(RECORDS, new, WORDS, examples=1)
    told = [
        (one.before.action, one.after.action, one.after.rule, one.count) for one in found.changes
    ]
    assert told == [
        ("refuse", "hint", "privacy.high", 2),
        ("hint", "refuse", "fairness.low", 1),
    ]
    assert [one["request"] for one in found.changes[0].examples] == ["a"]
    assert found.same == 4  # the school's stays allowed, the failed one refused
    assert json.loads(json.dumps(found.to_dict()))["changes"][0]["before"]["rule"] == "*.high"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view(found))
    page = console.export_text()
    assert "7 records: 3 change, 4 stay" in page and "privacy 0.500" in page


def test_a_threshold_is_replayed_from_the_probabilities() -> None:
    low = [record(verdict(("clean", "safe"), sure=0.55))]
    new = Policy.from_text("name: new\ninherits: strict\nthresholds: {privacy: 0.01}\n")
    (change,) = replay(low, new, WORDS).changes
    assert (change.before.action, change.examples[0]["after"]["type"]) == ("allow", "privacy")


def test_a_tenant_is_replayed_under_its_own_part() -> None:
    new = Policy.from_text("name: new\ninherits: strict\ntenants: {school: {}}\n")
    (change,) = replay(RECORDS, new, WORDS).changes
    assert [one["request"] for one in change.examples] == ["c"]
    assert (change.before.rule, change.after.action) == ("off.privacy", "refuse")


def broken(**changes: Any) -> dict[str, Any]:
    return {**record(verdict(("privacy", "high"))), **changes}


def without_levels(told: Mapping[str, Any]) -> dict[str, Any]:
    images = [{"type_probs": one["type_probs"]} for one in told["images"]]
    return {**told, "images": images}


WHOLE = record(verdict(("privacy", "high")))["verdict"]


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (
            broken(decision=None, error={"code": "timeout"}),
            "failed before it was decided (timeout)",
        ),
        (broken(tenant="shop"), "does not name the tenant shop"),
        (broken(verdict=without_levels(WHOLE)), "not whole"),
        (broken(verdict={**WHOLE, "images": []}), "not of this taxonomy (no image was assessed)"),
        (broken(verdict={**WHOLE, "concepts": {}}), "not of this taxonomy"),
        ({"request": "r"}, "not whole"),
    ],
)
def test_what_is_not_on_record_is_counted_apart(one: dict[str, Any], told: str) -> None:
    found = replay([one, RECORDS[0]], Policy.from_text(SAME), WORDS)
    assert (found.same, found.changes) == (1, [])
    ((why, count),) = found.apart.items()
    assert told in why and count == 1


def test_a_verdict_comes_back_as_it_was_written() -> None:
    seen = verdict(("clean", "safe"), ("privacy", "high"))
    back = Verdict.from_dict(seen.to_dict())
    assert back.to_dict() == seen.to_dict()
    assert back.problem(WORDS) is None
