"""What `policy show` and `policy diff` tell."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from psa_vlm.policy import Policy
from psa_vlm.policy.overview import Change, diff, diff_table, to_dict, view
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()
MINE = """\
name: mine
inherits: default
rules: {privacy: {high: refuse}}  # cards
thresholds: {privacy: 0.25}
off: [politics]
"""


def shown(what: Any) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_view_shows_each_action_and_where_it_comes_from() -> None:
    told = shown(view(Policy.from_text(MINE, "mine.yaml"), TAXONOMY))
    lines = [line.split() for line in told.splitlines()]
    row = lines.index(["privacy", "hint", "hint", "refuse", "0.25"])
    assert lines[row + 1] == ["default.yaml:23", "default.yaml:24", "mine.yaml:3", "mine.yaml:4"]
    assert "allow (off)" in told
    assert "Sorry, I can not help with this because it involves {type}." in told


def test_view_takes_any_name_literally() -> None:
    policy = Policy.from_text("name: '[bold]x[/]'\ninherits: default\nrefusal: '[red]no[/red]'")
    told = shown(view(policy, TAXONOMY))
    assert "[bold]x[/]" in told and "[red]no[/red]" in told


def test_to_dict_has_every_cell() -> None:
    told = json.loads(json.dumps(to_dict(Policy.from_text(MINE, "mine.yaml"), TAXONOMY)))
    cells = {(cell["type"], cell["level"]): cell for cell in told["cells"]}
    assert len(cells) == 18
    assert cells["privacy", "high"] == {
        "type": "privacy",
        "level": "high",
        "action": "refuse",
        "rule": "privacy.high",
        "source": {
            "file": "mine.yaml",
            "line": 3,
            "comment": "cards",
            "text": "rules: {privacy: {high: refuse}}  # cards",
        },
    }
    assert cells["politics", "low"]["rule"] == "off.politics"
    assert told["thresholds"] == {"privacy": 0.25}
    assert told["texts"]["hints.low"]["source"]["file"] == "psa_vlm/policies/default.yaml"


def test_diff_names_cells_thresholds_texts_and_tenants() -> None:
    base = Policy.from_text("name: a\ninherits: default\ntenants: {old: {}}")
    text = (
        MINE + "refusal: No.\nlanguages: {de: {refusal: Nein.}}\ntenants: {acme: {off: [privacy]}}"
    )
    other = Policy.from_text(text)
    assert diff(base, other, TAXONOMY) == [
        *(Change(f"politics.{level}", "hint", "allow") for level in TAXONOMY.levels[1:]),
        Change("privacy.high", "hint", "refuse"),
        Change("refusal", base.refusal, "No."),
        Change("tenants.old", "named", None),
        Change("thresholds.privacy", None, 0.25),
        Change("languages.de.refusal", None, "Nein."),
        Change("tenants.acme", None, "named"),
        Change("tenants.acme.off", None, ("privacy",)),
    ]
    told = shown(diff_table(diff(base, other, TAXONOMY)))
    assert "privacy.high" in told and "nothing" in told


rules = st.dictionaries(
    st.sampled_from(TAXONOMY.risk_types),
    st.dictionaries(st.sampled_from(TAXONOMY.levels[1:]), st.sampled_from(["allow", "hint"])),
)


@settings(max_examples=30)
@given(rules, rules)
def test_diff_is_empty_only_between_policies_that_act_alike(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    default = Policy.default()
    first, second = (
        default.model_copy(update={"rules": {**own, "*": default.rules["*"]}})
        for own in (one, other)
    )
    changed = {change.what for change in diff(first, second, TAXONOMY)}
    for name in TAXONOMY.risk_types:
        for level in TAXONOMY.levels[1:]:
            before, after = first.rule(name, level), second.rule(name, level)
            assert before and after
            assert (before.action != after.action) == (f"{name}.{level}" in changed)
