"""What files inherit, and where everything is written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import psa_vlm
from psa_vlm.errors import PolicyError
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy import Policy, Source
from psa_vlm.policy.files import shipped_names
from psa_vlm.policy.schema import SEVERITY
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()
SHIPPED = Path(psa_vlm.__file__).parent / "policies"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def verdict_of(concepts: dict[str, str]) -> Verdict:
    clean = ImageVerdict(
        {name: float(name == "clean") for name in TAXONOMY.types},
        {name: float(name == "safe") for name in TAXONOMY.levels},
    )
    return Verdict.from_probs([clean], TAXONOMY).override(concepts, TAXONOMY)


# --- shipped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_policy_fits_and_is_called_as_its_file(name: str) -> None:
    policy = Policy.shipped(name)
    policy.check(TAXONOMY)
    assert policy.name == name
    assert Policy.load(name) == policy == Policy.from_yaml(SHIPPED / f"{name}.yaml")


def test_these_policies_are_shipped() -> None:
    assert shipped_names() == ("captcha-allowed", "default", "kids", "research", "strict")
    with pytest.raises(PolicyError, match="'lax' is not a shipped policy; use one of captcha-all"):
        Policy.shipped("lax")


def test_load_takes_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "strict", "name: mine\ninherits: default\n")
    assert Policy.load("strict").name == "strict"
    assert Policy.load("./strict").name == Policy.load(tmp_path / "strict").name == "mine"
    with pytest.raises(PolicyError, match=r"lax: no such file, and no shipped policy \(captcha"):
        Policy.load("lax")


def test_the_shipped_schema_is_current() -> None:
    shipped = json.loads((SHIPPED / "policy.schema.json").read_text("utf-8"))
    assert shipped == Policy.json_schema(), "psa-vlm policy schema writes it anew"


def test_the_schema_knows_every_key_and_no_other() -> None:
    schema = Policy.json_schema()
    assert set(schema["properties"]) == {*Policy.model_fields, "inherits"}
    assert schema["additionalProperties"] is False
    tenant = schema["$defs"]["Overrides"]
    assert set(tenant["properties"]) == {*Policy.model_fields} - {"name", "tenants"}
    assert all("description" in key for key in schema["properties"].values())


# --- inheritance ---------------------------------------------------------------------------------

actions = st.sampled_from(SEVERITY)
types = st.sampled_from(TAXONOMY.risk_types)
levels = st.sampled_from(TAXONOMY.levels[1:])
changes = st.fixed_dictionaries(
    {},
    optional={
        "rules": st.dictionaries(
            st.sampled_from(["*", *TAXONOMY.risk_types]), st.dictionaries(levels, actions)
        ),
        "off": st.lists(types, unique=True),
        "thresholds": st.dictionaries(types, st.floats(0.01, 0.99)),
        "hints": st.dictionaries(levels, st.sampled_from(["Mind {type}.", "{{no}}"])),
        "refusal": st.sampled_from(["No.", "Not {type}."]),
        "refusal_error": st.just("Not seen."),
        "languages": st.dictionaries(
            st.sampled_from(["de", "no"]),
            st.fixed_dictionaries({}, optional={"refusal": st.just("-")}),
        ),
        "tenants": st.dictionaries(
            st.sampled_from(["acme", "rules"]),
            st.fixed_dictionaries({}, optional={"off": st.lists(types, unique=True)}),
        ),
    },
)


def flat(data: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(data, dict):
        return {
            key: at
            for name, value in data.items()
            for key, at in flat(value, (*path, name)).items()
        }
    return {path: list(data) if isinstance(data, tuple) else data}


@settings(max_examples=30)
@given(changes, changes)
def test_a_child_overrides_only_what_it_names(
    tmp_path_factory: pytest.TempPathFactory, parent: dict[str, Any], child: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("policies")
    write(folder / "p.yaml", yaml.safe_dump({"name": "p", "inherits": "strict", **parent}))
    path = write(folder / "c.yaml", yaml.safe_dump({"name": "c", "inherits": "p.yaml", **child}))
    policy = Policy.from_yaml(path)
    before = flat(Policy.from_yaml(folder / "p.yaml").model_dump())
    named = flat({"name": "c", **child})
    assert flat(policy.model_dump()) == {**before, **named}
    for key in named:
        if key[0] != "off" and key[-1] != "off":
            source = policy.source(*key)
            assert source and source.file == str(path), key


def test_files_inherit_from_files_beside_them(tmp_path: Path) -> None:
    write(tmp_path / "house.yaml", "name: house\ninherits: kids\noff: [privacy]\n")
    path = write(tmp_path / "shop/door.yaml", "name: door\ninherits: ../house.yaml\n")
    policy = Policy.from_yaml(path)
    assert (policy.name, policy.off) == ("door", ("privacy",))
    assert policy.refusal == Policy.shipped("kids").refusal
    assert policy.hints == Policy.default().hints


def test_a_circle_is_one_clear_error(tmp_path: Path) -> None:
    for name, parent in (("a", "b.yaml"), ("b", "./c.yaml"), ("c", "a.yaml"), ("d", "d.yaml")):
        write(tmp_path / f"{name}.yaml", f"name: {name}\ninherits: {parent}\n")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(tmp_path / "a.yaml")
    told = "inherits: a circle, a.yaml -> b.yaml -> c.yaml -> a.yaml; take one of them out"
    assert str(caught.value) == f"{tmp_path / 'c.yaml'}:2: {told}"
    with pytest.raises(PolicyError, match=r"d\.yaml:2: inherits: a circle, d\.yaml -> d\.yaml;"):
        Policy.from_yaml(tmp_path / "d.yaml")


def test_two_files_may_share_a_parent(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "name: a\ninherits: strict\n")
    write(tmp_path / "b.yaml", "name: b\ninherits: a.yaml\n")
    assert Policy.from_yaml(tmp_path / "b.yaml").rules == Policy.shipped("strict").rules


def test_a_missing_parent_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: a\n\ninherits: strikt\n")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    assert str(caught.value) == (
        f"{path}:3: inherits: 'strikt' is not a shipped policy ({', '.join(shipped_names())}), "
        f"and there is no file {tmp_path / 'strikt'}"
    )


def test_a_mistake_in_a_parent_is_told_with_the_parents_line(tmp_path: Path) -> None:
    parent = write(tmp_path / "p.yaml", "name: p\ninherits: default\nrefuse: all\n")
    path = write(tmp_path / "c.yaml", "name: c\ninherits: p.yaml\n")
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path)
    assert str(caught.value).startswith(f"{parent}:3: unknown key 'refuse'; known keys: name, ")


def test_a_text_inherits_from_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.yaml", "name: p\ninherits: default\n")
    assert Policy.from_text("name: a\ninherits: strict").rules["*"]["high"] == "refuse"
    with pytest.raises(PolicyError, match=r"policy:2: inherits: 'p\.yaml' is not a shipped policy"):
        Policy.from_text("name: a\ninherits: p.yaml")


# --- sources and comments ------------------------------------------------------------------------

COMMENTED = """\
name: mine  # of the house
inherits: default
rules:
  # every type
  "*":
    low: allow  # a low level is fine
    medium: hint
  privacy: {medium: refuse, high: refuse}  # cards are read
                                           # by nobody
  # a court said so,
  # in 2024
  misleading:
    # not this

    high: refuse
  fairness: {high: refuse}
off:
  - politics  # asked for
  # not ours
  - illegal_risk
refusal: |
  No # this is no comment
  # nor is this
refusal_error: "No # nor this"
tenants:
  acme:
    rules:
      fairness:
        high: hint  # acme asked
"""


@pytest.mark.parametrize(
    ("type", "level", "rule", "line", "comment"),
    [
        ("insults_and_bullying", "low", "*.low", 6, "a low level is fine"),
        ("insults_and_bullying", "medium", "*.medium", 7, "every type"),
        ("privacy", "medium", "privacy.medium", 8, "cards are read"),
        ("privacy", "high", "privacy.high", 8, "cards are read"),
        ("misleading", "high", "misleading.high", 15, "a court said so, in 2024"),
        ("fairness", "high", "fairness.high", 16, None),
        ("politics", "high", "off.politics", 18, "asked for"),
        ("illegal_risk", "low", "off.illegal_risk", 20, "not ours"),
    ],
)
def test_a_decision_names_the_line_and_the_comment(
    tmp_path: Path, type: str, level: str, rule: str, line: int, comment: str | None
) -> None:
    path = write(tmp_path / "mine.yaml", COMMENTED)
    decision = Policy.from_yaml(path).decide(verdict_of({type: level}), TAXONOMY)
    assert decision.rule == rule
    assert decision.source == Source(str(path), line, comment)
    assert decision.source.text == COMMENTED.splitlines()[line - 1].strip()
    assert str(decision.source) == f"{path}:{line}"
    assert json.loads(json.dumps(decision.to_dict()))["source"]["comment"] == comment


def test_a_tenants_rule_names_its_own_line_and_the_rest_keep_theirs() -> None:
    acme = Policy.from_text(COMMENTED, "mine.yaml").for_tenant("acme")
    found = {
        name: acme.decide(verdict_of({name: "high"}), TAXONOMY) for name in ("fairness", "privacy")
    }
    assert found["fairness"].source == Source("mine.yaml", 29, "acme asked")
    assert found["privacy"].source == Source("mine.yaml", 8, "cards are read")


def test_what_came_from_no_file_has_no_source() -> None:
    policy = Policy.shipped("strict")
    high = verdict_of({"privacy": "high"})
    assert policy.decide(verdict_of({}), TAXONOMY).source is None
    assert policy.decide(Verdict.failed("boom"), TAXONOMY).source is None
    assert Policy.model_validate(policy.model_dump()).decide(high, TAXONOMY).source is None
    changed = policy.model_copy(update={"rules": Policy.default().rules})
    assert changed.decide(high, TAXONOMY).source is None
    assert changed.source("refusal") == policy.source("refusal") is not None


def test_where_a_policy_is_written_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    text = "name: a\ninherits: default\noff: [privacy]\n"
    one, other = Policy.from_text(text), Policy.from_text(f"# why\n{text}", "elsewhere")
    assert one == other and one.hash == other.hash
    assert one != Policy.from_text(text.replace("privacy", "fairness"))


def test_a_written_policy_keeps_the_comments_of_its_actions(tmp_path: Path) -> None:
    policy = Policy.from_text(COMMENTED)
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    policy.to_yaml(first)
    again = Policy.from_yaml(first)
    assert again == policy
    for type, level in (("privacy", "high"), ("politics", "low"), ("insults_and_bullying", "low")):
        told, kept = (one.rule(type, level) for one in (policy, again))
        assert told and kept and told.source and kept.source
        assert kept.source.comment == told.source.comment is not None
        assert kept.source.file == str(first)
    again.to_yaml(second)
    assert first.read_text("utf-8") == second.read_text("utf-8")


def test_sources_cross_process_boundaries() -> None:
    policy = Policy.from_text(COMMENTED, "mine.yaml")
    copy = pickle.loads(pickle.dumps(policy))
    assert copy == policy
    assert copy.source("off", "politics") == Source("mine.yaml", 18, "asked for")


def test_check_names_the_line(tmp_path: Path) -> None:
    text = "name: a\ninherits: default\nrules:\n  weather: {low: hint}\nthresholds: {wind: 0.5}\n"
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path).check(TAXONOMY)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:4: rules.weather: not a risk type; use one of *, politics")
    assert second.startswith(f"{path}:5: thresholds.wind: not a risk type; use one of politics")
