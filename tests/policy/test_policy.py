from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy import VERDICT_ERROR, Policy
from psa_vlm.policy.policy import SEVERITY
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()
DEFAULT = Policy.default()
CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
TENANT_KEYS = "rules, off, thresholds, hints, refusal, refusal_error, languages"
KEYS = f"name, inherits, {TENANT_KEYS}, tenants"


def image(type: str, level: str, share: float = 1.0) -> ImageVerdict:
    """An image that is surely at this level, and of this type with this probability."""
    type_probs = dict.fromkeys(TAXONOMY.types, 0.0) | {"clean": 1 - share}
    return ImageVerdict(
        {**type_probs, type: type_probs[type] + share},
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
    if isinstance(case["policy"], str):
        policy = Policy.shipped(case["policy"])
    else:
        file = tmp_path / "policy.yaml"
        file.write_text(yaml.safe_dump(case["policy"]), "utf-8")
        policy = Policy.from_yaml(file)
    policy.check(TAXONOMY)
    if "tenant" in case:
        policy = policy.for_tenant(case["tenant"])
    if "error" in case:
        verdict = Verdict.failed(case["error"])
    else:
        verdict = Verdict.from_probs([image(**one) for one in case["images"]], TAXONOMY)
    verdict = verdict.override(case.get("override", {}), TAXONOMY)
    decision = policy.decide(verdict, TAXONOMY, case.get("language")).to_dict()
    if decision["source"]:  # where the repository lies does not matter
        decision["source"]["file"] = Path(decision["source"]["file"]).name
        del decision["source"]["text"]  # tests/policy/test_files.py
    assert {key: decision[key] for key in expected} == expected


def test_there_are_cases() -> None:
    assert len(CASES) >= 20


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


@settings(max_examples=30)
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
            "hints.low: {kind} is not known here; use {type}, {level}",
        ),
        (
            {"refusal": "No {type.__class__}"},
            "refusal: {type.__class__} is not known here; use {type}, {level}, {reason}",
        ),
        ({"refusal": "No {type!r}"}, "refusal: {type} is not known here; use "),
        ({"refusal": "No {"}, "refusal: Single '{' encountered in format string; write {{ and }}"),
        ({"refusal": " "}, "refusal: the text is empty; write one"),
        ({"refusal_error": "{type}"}, "refusal_error: {type} is not known here; use {reason}"),
        ({"off": "privacy"}, "off: write a list, as in [privacy], not 'privacy'"),
        ({"off": [3]}, "off.0: write words"),
        ({"name": 3}, "name: write words"),
        ({"rules": ["*"]}, "rules: write keys and values beneath it, not ['*']"),
        ({3: "x"}, "3: write words"),
        ({"thresholds": {"privacy": 1}}, "thresholds.privacy: 1 is not a number between 0 and 1"),
        ({"thresholds": {"privacy": 0.0}}, "thresholds.privacy: 0.0 is not a number between"),
        ({"thresholds": {"privacy": math.nan}}, "thresholds.privacy: nan is not a number between"),
        ({"thresholds": {"privacy": "0.5"}}, "thresholds.privacy: '0.5' is not a number between"),
        ({"thresholds": {"privacy": None}}, "thresholds.privacy: None is not a number between"),
        (
            {"languages": {"german": {}}},
            "languages.german: 'german' is not a language; write a tag such as de or pt-BR",
        ),
        (
            {"languages": {"de": {"rules": {}}}},
            "unknown key 'languages.de.rules'; known keys: hints, refusal, refusal_error, words",
        ),
        ({"languages": {"de": {"refusal": "{x}"}}}, "languages.de.refusal: {x} is not known here"),
        (
            {"tenants": {"acme": {"inherits": "strict"}}},
            f"unknown key 'tenants.acme.inherits'; known keys: {TENANT_KEYS}",
        ),
        ({"tenants": {"acme": {"rules": {"*": {"low": "no"}}}}}, "tenants.acme.rules.*.low: 'no'"),
    ],
)
def test_a_wrong_file_is_told_by_file_line_and_key(
    tmp_path: Path, changes: dict[Any, Any], line: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SHIPPED, **changes}), "utf-8")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    place, told = str(caught.value).removeprefix(f"{path}:").split(": ", 1)
    assert told.startswith(line)
    assert "\n" not in told
    told_key = line.removeprefix("unknown key '").split("'")[0].split(":")[0]
    key = {"off.0": "3"}.get(told_key, told_key.split(".")[-1])
    assert key in path.read_text("utf-8").splitlines()[int(place) - 1]


def test_every_mistake_gets_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\nrules: {}\nhints: {}\nrefusals: a\n", "utf-8")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    fix = "write it, or inherit it with 'inherits: default'"
    assert str(caught.value).splitlines() == [
        f"{path}:1: the key 'refusal' is missing; {fix}",
        f"{path}:1: the key 'refusal_error' is missing; {fix}",
        f"{path}:4: unknown key 'refusals'; known keys: {KEYS}",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "policy:1: not valid YAML"),
        ("name: a\nb: @", "policy:2: not valid YAML"),
        ('name: a\ninherits: strict\nrules: &r {"*": *r}', "policy:3: rules"),
        ("name: a\n---\nname: b", "policy:2: not valid YAML"),
        ("a: 2001-99-99", "policy: not valid YAML: month must be in 1..12"),
        ("[" * 1000, "not valid YAML"),
        ("a: \x00", "policy: not valid YAML"),
        ("rules: {*: {low: hint}}", 'write "\\*" with its quotes'),
        ("name: a\nname: b", "policy:2: not valid YAML: the key 'name' is given twice"),
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
        ({"off": ("weather",)}, "off.weather: not a risk type; use one of politics"),
        ({"thresholds": {"clean": 0.5}}, "thresholds.clean: not a risk type; use one of politics"),
        (
            {"languages": {"de": {"hints": {"huge": "x"}}}},
            "languages.de.hints.huge: not a level; use one of safe",
        ),
        (
            {"languages": {"de": {"words": {"weather": "Wetter"}}}},
            "languages.de.words.weather: neither a risk type nor a level; use politics",
        ),
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


def test_check_looks_at_every_tenant() -> None:
    policy = a_policy(tenants={"acme": {"rules": {"weather": {"low": "hint"}}}, "other": {}})
    with pytest.raises(PolicyError, match=r"policy default/acme: rules\.weather: not a risk type"):
        policy.check(TAXONOMY)
    # Of the others, none is in the way of a decision.
    assert policy.decide(verdict_of({}), TAXONOMY).rule == "clean"
    assert policy.for_tenant("acme").decide(verdict_of({}), TAXONOMY).rule == VERDICT_ERROR


def test_the_default_policy_fits_the_default_taxonomy() -> None:
    DEFAULT.check(TAXONOMY)
    a_policy(rules={"*": {**SHIPPED["rules"]["*"], "safe": "allow"}}).check(TAXONOMY)


# --- thresholds ----------------------------------------------------------------------------------

probabilities = st.floats(0, 1)


@st.composite
def soft_images(draw: st.DrawFn) -> ImageVerdict:
    def shares(names: tuple[str, ...]) -> dict[str, float]:
        weights = draw(st.lists(st.integers(0, 9), min_size=len(names), max_size=len(names)))
        weights[-1] += not any(weights)
        return {name: w / sum(weights) for name, w in zip(names, weights, strict=True)}

    return ImageVerdict(shares(TAXONOMY.types), shares(TAXONOMY.levels))


@pytest.mark.parametrize(
    ("share", "level", "expected"),
    [
        (0.31, "high", ("refuse", "privacy.high")),  # clean is more probable, yet it is found
        (0.3, "high", ("refuse", "privacy.high")),
        (0.29, "high", ("allow", "clean")),
        (0.9, "low", ("hint", "*.low")),
        (0.9, "safe", ("allow", "clean")),
    ],
)
def test_a_fixed_threshold_decides(share: float, level: str, expected: tuple[str, str]) -> None:
    rules = {**DEFAULT.rules, "privacy": {"high": "refuse"}}
    policy = a_policy(thresholds={"privacy": 0.3}, rules=rules)
    verdict = Verdict.from_probs([image("clean", "safe"), image("privacy", level, share)], TAXONOMY)
    decision = policy.decide(verdict, TAXONOMY)
    assert (decision.action, decision.rule) == expected


def test_a_high_threshold_lets_a_likely_type_pass_and_leaves_the_others() -> None:
    policy = a_policy(thresholds={"privacy": 0.9})
    for name, rule in (("privacy", "clean"), ("fairness", "*.high")):
        verdict = Verdict.from_probs([image(name, "high", 0.8)], TAXONOMY)
        assert policy.decide(verdict, TAXONOMY).rule == rule


def test_a_found_type_is_never_at_the_safe_level() -> None:
    levels = {"safe": 0.4, "low": 0.1, "medium": 0.25, "high": 0.25}
    one = replace(image("privacy", "low"), level_probs=levels)
    verdict = Verdict.from_probs([one], TAXONOMY)
    assert DEFAULT.decide(verdict, TAXONOMY).rule == "clean"
    assert a_policy(thresholds={"privacy": 0.5}).decide(verdict, TAXONOMY).rule == "*.high"


def test_the_callers_own_level_stands_before_a_threshold() -> None:
    policy = a_policy(thresholds={"privacy": 0.1})
    verdict = Verdict.from_probs([image("privacy", "high")], TAXONOMY)
    cleared = verdict.override({"privacy": "safe"}, TAXONOMY)
    assert policy.decide(cleared, TAXONOMY).rule == "clean"


@given(
    st.lists(soft_images(), min_size=1, max_size=3), st.floats(0.01, 0.99), st.floats(0.01, 0.99)
)
def test_a_lower_threshold_is_never_milder(
    images: list[ImageVerdict], one: float, other: float
) -> None:
    verdict = Verdict.from_probs(images, TAXONOMY)
    rules = {"*": {"low": "allow", "medium": "hint", "high": "refuse"}}
    lower, higher = (
        a_policy(rules=rules, thresholds={"privacy": least}).decide(verdict, TAXONOMY)
        for least in sorted((one, other))
    )
    assert VERDICT_ERROR not in (lower.rule, higher.rule)
    assert SEVERITY.index(lower.action) >= SEVERITY.index(higher.action)


@given(st.sampled_from([math.nan, math.inf, -1.0, None, "1"]), st.sampled_from(["type", "level"]))
def test_a_threshold_never_makes_a_broken_verdict_whole(number: Any, which: str) -> None:
    policy = a_policy(thresholds=dict.fromkeys(TAXONOMY.risk_types, 0.99))
    verdict = verdict_of({})
    key = {"type": "privacy", "level": "low"}[which]
    probs = getattr(verdict.images[0], f"{which}_probs")
    broken = replace(verdict.images[0], **{f"{which}_probs": {**probs, key: number}})
    for images in ((broken,), (*verdict.images, broken)):
        decision = policy.decide(replace(verdict, images=images), TAXONOMY)
        assert (decision.action, decision.rule) == ("refuse", VERDICT_ERROR)
    missing = replace(verdict, images=(replace(broken, **{f"{which}_probs": {}}),))
    assert policy.decide(missing, TAXONOMY).rule == VERDICT_ERROR


# --- languages -----------------------------------------------------------------------------------

GERMAN = {"hints": {"high": "Achtung: {type}."}, "words": {"privacy": "Privates", "high": "hoch"}}
SPOKEN = a_policy(languages={"de": GERMAN, "no": {"refusal_error": "Bildet kan ikke vurderes."}})


@pytest.mark.parametrize(
    ("language", "level", "hint"),
    [
        ("de", "high", "Achtung: Privates."),
        ("de_AT", "high", "Achtung: Privates."),
        ("DE-at", "high", "Achtung: Privates."),
        ("de", "low", "Safe Hint: this image may involve Privates. Answer with care."),
        ("den", "low", "Safe Hint: this image may involve privacy. Answer with care."),
        ("", "low", "Safe Hint: this image may involve privacy. Answer with care."),
        (None, "low", "Safe Hint: this image may involve privacy. Answer with care."),
    ],
)
def test_texts_are_those_of_the_language_or_else_the_policys_own(
    language: str | None, level: str, hint: str
) -> None:
    assert SPOKEN.decide(verdict_of({"privacy": level}), TAXONOMY, language).hint == hint


def test_a_failed_verdict_is_refused_in_any_language() -> None:
    failed = Verdict.failed("boom")
    assert SPOKEN.decide(failed, TAXONOMY, "no").refusal == "Bildet kan ikke vurderes."
    for language in ("de", "x", "", 3, ["de"]):
        decision = SPOKEN.decide(failed, TAXONOMY, language)  # type: ignore[arg-type]
        assert (decision.rule, decision.refusal) == (VERDICT_ERROR, DEFAULT.refusal_error)


def test_a_language_that_is_no_word_is_refused_and_not_raised() -> None:
    decision = SPOKEN.decide(verdict_of({"privacy": "low"}), TAXONOMY, 3)  # type: ignore[arg-type]
    assert (decision.action, decision.rule) == ("refuse", VERDICT_ERROR)


# --- tenants -------------------------------------------------------------------------------------


def test_a_tenant_changes_only_what_it_names() -> None:
    policy = a_policy(
        tenants={"acme": {"rules": {"privacy": {"high": "refuse"}}, "refusal": "No."}}
    )
    acme = policy.for_tenant("acme")
    assert acme.name == "default/acme"
    assert acme.rules == {**DEFAULT.rules, "privacy": {"high": "refuse"}}
    assert acme.refusal == "No."
    kept = acme.model_copy(
        update={"name": "default", "rules": DEFAULT.rules, "refusal": DEFAULT.refusal}
    )
    assert kept == DEFAULT


def test_an_unknown_tenant_is_an_error_and_not_the_policy_itself() -> None:
    with pytest.raises(PolicyError, match="no tenant 'acne' \\(there are: acme\\)"):
        a_policy(tenants={"acme": {}}).for_tenant("acne")


overrides = st.fixed_dictionaries(
    {},
    optional={
        "rules": rules,
        "off": st.lists(st.sampled_from(TAXONOMY.risk_types), unique=True),
        "thresholds": st.dictionaries(st.sampled_from(TAXONOMY.risk_types), st.floats(0.01, 0.99)),
        "hints": st.dictionaries(st.sampled_from(risky_levels), st.just("Mind {type}.")),
        "refusal": st.sampled_from(["No.", "Not {type}."]),
        "languages": st.just({"de": {"refusal": "Nein."}}),
    },
)


@given(policies, overrides, overrides, concepts)
def test_tenants_never_leak(
    policy: Policy, one: dict[str, Any], other: dict[str, Any], levels: dict[str, str]
) -> None:
    both = Policy.model_validate({**policy.model_dump(), "tenants": {"one": one, "other": other}})
    alone = Policy.model_validate({**policy.model_dump(), "tenants": {"one": one}})
    assert both.for_tenant("one") == alone.for_tenant("one")
    assert both.for_tenant("one").tenants == {}
    verdict = verdict_of(levels)
    both.for_tenant("other").decide(verdict, TAXONOMY)
    assert both.decide(verdict, TAXONOMY, "de") == policy.decide(verdict, TAXONOMY, "de")
