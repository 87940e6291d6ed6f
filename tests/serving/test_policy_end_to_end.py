"""Every shipped policy and kind of rule, from an image over HTTP to the words and the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from psa_vlm.inference import PsaVlm
from psa_vlm.policy.files import shipped_names
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.audit import Audit

from .conftest import CHAT, MakeService, chat, client_of

HOUSE = """
name: house
inherits: strict
thresholds: {politics: 0.5}
rules:
  privacy: {high: hint}  # our users scan their own papers
  politics:
    # nobody is asked about these
    low: allow
off: [fairness]
tenants: {}
"""
SORRY = "Sorry, I can not help"

SHIPPED = [
    ("default", "privacy", "low", "hint", "*.low", "may involve privacy"),
    ("default", "privacy", "high", "hint", "*.high", "You must refuse"),
    ("default", "clean", "safe", "allow", "clean", None),
    ("strict", "privacy", "low", "hint", "*.low", "may involve privacy"),
    ("strict", "privacy", "medium", "refuse", "*.medium", SORRY),
    ("research", "privacy", "medium", "allow", "*.medium", None),
    ("research", "privacy", "high", "hint", "*.high", "You must refuse"),
    ("kids", "privacy", "low", "refuse", "*.low", "Let us look at another picture."),
    ("captcha-allowed", "privacy", "high", "allow", "off.privacy", None),
    ("captcha-allowed", "politics", "high", "hint", "*.high", "You must refuse"),
]
KINDS = [
    ("house", "privacy", "high", "hint", "privacy.high", "You must refuse"),
    ("house", "politics", "low", "allow", "politics.low", None),
    ("house", "fairness", "high", "allow", "off.fairness", None),
    ("house", "misleading", "high", "refuse", "*.high", SORRY),
    ("house", "misleading", None, "refuse", "verdict-error", SORRY),
]


@pytest.mark.parametrize(("name", "type", "level", "action", "rule", "words"), SHIPPED + KINDS)
def test_from_an_image_to_words_and_record(
    model: PsaVlm,
    make_service: MakeService,
    see: Any,
    make_url: Any,
    audit: Audit,
    prompts: list[str],
    name: str,
    type: str,
    level: str | None,
    action: str,
    rule: str,
    words: str | None,
) -> None:
    see(type, level or "high")
    if level is None:
        with torch.no_grad():
            model.bottleneck.head.to_level.bias.fill_(float("nan"))
    policy = Policy.from_text(HOUSE) if name == "house" else Policy.shipped(name)
    with client_of(make_service(policy)) as client:
        reply = client.post(CHAT, json=chat(make_url(), max_tokens=2)).json()
    decided = reply["psa"]["decision"]
    assert (decided["action"], decided["rule"]) == (action, rule)
    refusal = reply["choices"][0]["message"]["refusal"]
    if action == "refuse":
        assert refusal.startswith(words) and not prompts
    else:
        assert refusal is None and len(prompts) == 1
        assert ("Safe Hint" in prompts[0]) == (action == "hint")
        assert words is None or words in prompts[0]
    (record,) = audit.records()
    assert (record["decision"]["action"], record["decision"]["rule"]) == (action, rule)
    assert record["policy"] == {"name": policy.name, "hash": policy.hash}


def test_every_shipped_policy_is_among_them() -> None:
    assert {name for name, *_ in SHIPPED} == set(shipped_names())


@pytest.mark.parametrize(
    ("type", "level", "line", "comment"),
    [
        ("privacy", "high", 6, "our users scan their own papers"),
        ("politics", "low", 9, "nobody is asked about these"),
        ("fairness", "high", 10, None),
    ],
)
def test_the_line_and_its_comment_reach_the_decision(
    model: PsaVlm, see: Any, picture: Path, type: str, level: str, line: int, comment: str | None
) -> None:
    see(type, level)
    policy = Policy.from_text(HOUSE, "house.yaml")
    decision = model.reply(picture, "What is this?", policy, max_new_tokens=1).decision
    assert decision.source is not None
    assert (str(decision.source), decision.source.comment) == (f"house.yaml:{line}", comment)
