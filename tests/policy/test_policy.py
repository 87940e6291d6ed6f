from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy import VERDICT_ERROR, Policy
from psa_vlm.policy.policy import SEVERITY
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()
DEFAULT = Policy.default()
CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
KEYS = "name, rules, off, hints, refusal, refusal_error"


def image(type: str, level: str) -> ImageVerdict:
    return ImageVerdict(
        {one: float(one == type) for one in TAXONOMY.types},
        {one: float(one == level) for one in TAXONOMY.levels},
    )


def verdict_of(concepts: dict[str, str]) -> Verdict:
    return Verdict.from_probs([image("clean", "safe")], TAXONOMY).override(concepts, TAXONOMY)


def a_policy(**changes: Any) -> Policy:
    return Policy.model_validate({**DEFAULT.model_dump(), **changes})


actions = st.sampled_from(SEVERITY)
risky_levels = TAXONOMY.levels[1:]
concepts = st.fixed_dictionaries(
    {name: st.sampled_from(TAXONOMY.levels) for name in TAXONOMY.risk_types}
)
rules = st.dictionaries(
    st.sampled_from(TAXONOMY.risk_types),
    st.dictionaries(st.sampled_from(risky_levels), actions),
)
policies = st.builds(
    lambda any_rule, own, off: a_policy(rules={"*": any_rule, **own}, off=tuple(off)),
    st.fixed_dictionaries({level: actions for level in risky_levels}),
    rules,
    st.sets(st.sampled_from(TAXONOMY.risk_types)),
)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, tmp_path: Path) -> None:
    case = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)
    expected = yaml.safe_load(path.read_text("utf-8"))["decision"]
    policy = DEFAULT
    if case["policy"] != "default":
        file = tmp_path / "policy.yaml"
        file.write_text(yaml.safe_dump(case["policy"]), "utf-8")
        policy = Policy.from_yaml(file)
    policy.check(TAXONOMY)
    if "error" in case:
        verdict = Verdict.failed(case["error"])
    else:
        verdict = Verdict.from_probs([image(**one) for one in case["images"]], TAXONOMY)
    verdict = verdict.override(case.get("override", {}), TAXONOMY)
    decision = policy.decide(verdict, TAXONOMY).to_dict()
    assert {key: decision[key] for key in expected} == expected


def test_there_are_cases() -> None:
    assert len(CASES) >= 15


@given(policies, concepts)
def test_a_decision_is_complete(policy: Policy, levels: dict[str, str]) -> None:
    decision = policy.decide(verdict_of(levels), TAXONOMY)
    assert decision.rule != VERDICT_ERROR
    assert (decision.hint is not None) == (decision.action == "hint")
    assert (decision.refusal is not None) == (decision.action == "refuse")
    if decision.type is not None:
        assert levels[decision.type] == decision.level
    else:
        assert decision.rule == "clean"
        assert set(levels.values()) == {"safe"}


@given(policies, concepts, st.data())
def test_broken_verdicts_are_refused(
    policy: Policy, levels: dict[str, str], data: st.DataObject
) -> None:
    verdict = verdict_of(levels)
    name = data.draw(st.sampled_from(TAXONOMY.risk_types))
    number = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, -1.0, None, "1"]))
    one = verdict.images[0]
    broken = data.draw(
        st.sampled_from(
            [
                replace(verdict, error="boom"),
                replace(verdict, images=()),
                replace(verdict, images=(*verdict.images, None)),
                replace(verdict, concepts=None),
                replace(verdict, concepts={}),
                replace(verdict, concepts={k: v for k, v in levels.items() if k != name}),
                replace(verdict, concepts={**levels, name: "unknown"}),
                replace(verdict, concepts={**levels, name: math.nan}),
                replace(verdict, concepts={**levels, name: None}),
                replace(verdict, concepts={**levels, "weather": "low"}),
                replace(
                    verdict,
                    images=(replace(one, type_probs={**one.type_probs, name: number}),),
                ),
                replace(
                    verdict,
                    images=(replace(one, level_probs={**one.level_probs, "low": number}),),
                ),
                replace(verdict, images=(replace(one, type_probs={}),)),
                None,
            ]
        )
    )
    decision = policy.decide(broken, TAXONOMY)
    assert (decision.action, decision.rule) == ("refuse", VERDICT_ERROR)
    assert decision.refusal == (
        "Sorry, I can not help with this because the image could not be assessed."
    )
    assert decision.reason
    assert (decision.type, decision.level, decision.hint) == (None, None, None)


def test_an_exception_on_the_way_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(Policy, "_decide", fail)
    decision = DEFAULT.decide(verdict_of({}), TAXONOMY)
    assert (decision.action, decision.rule) == ("refuse", VERDICT_ERROR)
    assert decision.reason == "RuntimeError: disk on fire"


def test_another_taxonomy_is_refused() -> None:
    other = Taxonomy(types=("weapons", "clean"), levels=("safe", "high"), clean="clean")
    assert DEFAULT.decide(verdict_of({}), other).rule == VERDICT_ERROR


@given(policies, concepts, st.sampled_from(TAXONOMY.risk_types))
def test_switching_one_type_off_leaves_the_others_untouched(
    policy: Policy, levels: dict[str, str], name: str
) -> None:
    without = policy.decide(verdict_of({**levels, name: "safe"}), TAXONOMY)
    switched = policy.model_copy(update={"off": (*policy.off, name)})
    decision = switched.decide(verdict_of(levels), TAXONOMY)
    assert decision.action == without.action
    if decision.action != "allow":
        assert decision == without


@given(concepts, st.sampled_from(TAXONOMY.risk_types), st.data())
def test_a_higher_level_is_never_treated_more_mildly(
    levels: dict[str, str], name: str, data: st.DataObject
) -> None:
    order = sorted(data.draw(st.lists(actions, min_size=3, max_size=3)), key=SEVERITY.index)
    policy = a_policy(rules={"*": dict(zip(risky_levels, order, strict=True))})
    severity = [
        SEVERITY.index(policy.decide(verdict_of({**levels, name: level}), TAXONOMY).action)
        for level in TAXONOMY.levels
    ]
    assert severity == sorted(severity)


@given(policies, concepts)
def test_no_concept_is_treated_more_severely_than_the_whole(
    policy: Policy, levels: dict[str, str]
) -> None:
    clean = dict.fromkeys(TAXONOMY.risk_types, "safe")
    alone = [
        policy.decide(verdict_of({**clean, name: level}), TAXONOMY).action
        for name, level in levels.items()
    ]
    together = policy.decide(verdict_of(levels), TAXONOMY).action
    assert together == max(alone, key=SEVERITY.index)


@given(policies)
def test_yaml_keeps_the_policy(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> None:
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.to_yaml(path)
    again = Policy.from_yaml(path)
    assert again == policy
    assert again.hash == policy.hash


def test_the_hash_follows_the_content() -> None:
    assert DEFAULT.hash == Policy.default().hash
    assert a_policy(off=("privacy",)).hash != DEFAULT.hash


def test_a_decision_is_json() -> None:
    decision = DEFAULT.decide(verdict_of({"privacy": "low"}), TAXONOMY)
    assert json.loads(json.dumps(decision.to_dict()))["rule"] == "*.low"


SHIPPED = DEFAULT.model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rulez": {}}, f"unknown key 'rulez'; known keys: {KEYS}"),
        (
            {"rules": {"privacy": {"high": "deny"}}},
            "rules.privacy.high: 'deny' is not an action; use one of allow, hint, refuse",
        ),
        (
            {"hints": {"low": "Mind {kind}."}},
            "hints: low: {kind} is not known here; use {type}, {level}",
        ),
        (
            {"refusal": "No {type.__class__}"},
            "refusal: {type.__class__} is not known here; use {type}, {level}, {reason}",
        ),
        ({"refusal": "No {type!r}"}, "refusal: {type} is not known here; use "),
        ({"refusal": "No {"}, "refusal: Single '{' encountered in format string; write {{ and }}"),
        ({"refusal": " "}, "refusal: the text is empty"),
        ({"refusal_error": "{type}"}, "refusal_error: {type} is not known here; use {reason}"),
        ({"off": "privacy"}, "off: Input should be a valid tuple, got 'privacy'"),
        ({"name": 3}, "name: Input should be a valid string, got 3"),
    ],
)
def test_a_wrong_file_is_told_by_file_and_key(
    tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SHIPPED, **changes}), "utf-8")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: {line}")
    assert "\n" not in str(caught.value)


def test_every_mistake_gets_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\nrules: {}\nhints: {}\nrefusals: a\n", "utf-8")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    assert str(caught.value).splitlines() == [
        f"{path}: the key 'refusal' is missing",
        f"{path}: the key 'refusal_error' is missing",
        f"{path}: unknown key 'refusals'; known keys: {KEYS}",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "not valid YAML"),
        ("rules: {*: {low: hint}}", 'write "\\*" with its quotes'),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("[a]: b", "not valid YAML"),
        ("", "a policy is a mapping with the keys name"),
        ("- a", "a policy is a mapping with the keys name"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_text_that_is_no_policy(text: str, told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        Policy.from_text(text)


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    for path, content in ((tmp_path / "none.yaml", None), (tmp_path / "b.yaml", b"\xff\xfe\x00")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PolicyError, match="can not read the policy"):
            Policy.from_yaml(path)


def test_the_bare_word_off_is_a_key_and_not_a_truth_value() -> None:
    text = yaml.safe_dump({**SHIPPED, "off": ["privacy"]}).replace("'off'", "off")
    assert "\noff:" in text
    assert Policy.from_text(text).off == ("privacy",)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rules": {"*": SHIPPED["rules"]["*"], "weather": {}}}, "rules.weather: not a risk type"),
        ({"rules": {"*": SHIPPED["rules"]["*"], "clean": {}}}, "rules.clean: not a risk type"),
        ({"rules": {"*": {**SHIPPED["rules"]["*"], "huge": "hint"}}}, "rules.*.huge: not a level"),
        (
            {"rules": {"*": {**SHIPPED["rules"]["*"], "safe": "refuse"}}},
            "rules.*.safe: the level safe is always allowed",
        ),
        ({"off": ("weather",)}, "off: 'weather' is not a risk type; use one of politics"),
        ({"hints": {**SHIPPED["hints"], "huge": "x"}}, "hints.huge: not a level; use one of safe"),
        ({"hints": {}}, "hints.low: a rule hints at level low; write its text"),
        (
            {"rules": {"*": {"low": "hint", "high": "hint"}, "privacy": {"medium": "hint"}}},
            "rules: no action at level medium for politics, illegal_risk, insults_and_bullying, "
            'fairness, misleading; add medium to each, or to "*"',
        ),
    ],
)
def test_check_finds_what_does_not_fit_the_taxonomy(changes: dict[str, Any], line: str) -> None:
    policy = a_policy(**changes)
    with pytest.raises(PolicyError) as caught:
        policy.check(TAXONOMY)
    assert str(caught.value).splitlines()[0].startswith(f"policy default: {line}")
    assert policy.decide(verdict_of({}), TAXONOMY).rule == VERDICT_ERROR


def test_the_default_policy_fits_the_default_taxonomy() -> None:
    DEFAULT.check(TAXONOMY)
    a_policy(rules={"*": {**SHIPPED["rules"]["*"], "safe": "allow"}}).check(TAXONOMY)
