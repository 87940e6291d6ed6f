from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_vlm.errors import InputError, VerdictError
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()


def peaked(names: tuple[str, ...], name: str) -> dict[str, float]:
    rest = 0.2 / (len(names) - 1)
    return {one: 0.8 if one == name else rest for one in names}


def image(type: str, level: str, evidence: np.ndarray | None = None) -> ImageVerdict:
    return ImageVerdict(peaked(TAXONOMY.types, type), peaked(TAXONOMY.levels, level), evidence)


types = st.sampled_from(TAXONOMY.types)
levels = st.sampled_from(TAXONOMY.levels)
images = st.builds(image, types, levels)
broken_numbers = st.sampled_from([math.nan, math.inf, -math.inf, -0.1, 7.0, None, "0.5"])


def test_a_type_and_a_level_become_one_concept() -> None:
    verdict = Verdict.from_probs([image("privacy", "medium")], TAXONOMY)
    assert verdict.error is None
    assert verdict.concepts == {
        "politics": "safe",
        "illegal_risk": "safe",
        "insults_and_bullying": "safe",
        "fairness": "safe",
        "privacy": "medium",
        "misleading": "safe",
    }
    assert (verdict.worst, verdict.type, verdict.level) == (0, "privacy", "medium")


@pytest.mark.parametrize(("type", "level"), [("clean", "high"), ("privacy", "safe")])
def test_clean_or_safe_leaves_every_concept_safe(type: str, level: str) -> None:
    verdict = Verdict.from_probs([image(type, level)], TAXONOMY)
    assert set(verdict.concepts.values()) == {"safe"}


@given(st.lists(images, min_size=1, max_size=4))
def test_the_worst_level_of_each_type_is_kept(several: list[ImageVerdict]) -> None:
    verdict = Verdict.from_probs(several, TAXONOMY)
    rank = TAXONOMY.levels.index
    for name in TAXONOMY.risk_types:
        seen = [rank(one.level) for one in several if one.type == name]
        assert rank(verdict.concepts[name]) == max(seen, default=0)


@pytest.mark.parametrize(
    ("several", "worst"),
    [
        ([("clean", "high"), ("privacy", "low")], 1),
        ([("privacy", "low"), ("politics", "low")], 0),
        ([("privacy", "low"), ("politics", "high"), ("fairness", "high")], 1),
        ([("clean", "safe"), ("clean", "safe")], 0),
    ],
)
def test_the_image_with_the_highest_risk_decides(
    several: list[tuple[str, str]], worst: int
) -> None:
    verdict = Verdict.from_probs([image(*one) for one in several], TAXONOMY)
    assert (verdict.worst, verdict.type) == (worst, several[worst][0])


def test_ties_are_read_as_the_risk_and_the_worse_level() -> None:
    clean_first = Taxonomy(types=("clean", "privacy"), levels=("safe", "high"), clean="clean")
    even = ImageVerdict({"clean": 0.5, "privacy": 0.5}, {"high": 0.5, "safe": 0.5})
    assert Verdict.from_probs([even], clean_first).concepts == {"privacy": "high"}


@given(
    st.lists(images, min_size=1, max_size=3),
    st.data(),
    st.booleans(),
    broken_numbers,
)
def test_one_broken_number_fails_the_whole_verdict(
    several: list[ImageVerdict], data: st.DataObject, in_types: bool, value: float
) -> None:
    victim = data.draw(st.sampled_from(several))
    probs = victim.type_probs if in_types else victim.level_probs
    name = data.draw(st.sampled_from(sorted(probs)))
    probs[name] = value  # type: ignore[index]
    verdict = Verdict.from_probs(several, TAXONOMY)
    assert verdict.error
    assert verdict.concepts == {}
    assert verdict.type is verdict.level is verdict.worst is None
    json.loads(json.dumps(verdict.to_dict(), allow_nan=False))


def test_negative_numbers_that_sum_to_one_are_no_probabilities() -> None:
    one = image("privacy", "high")
    levels = {"safe": -0.5, "low": 0.5, "medium": 0.5, "high": 0.5}
    verdict = Verdict.from_probs([ImageVerdict(one.type_probs, levels)], TAXONOMY)
    assert "negative" in (verdict.error or "")


@given(images, st.data(), st.booleans())
def test_a_missing_or_foreign_name_fails_the_verdict(
    one: ImageVerdict, data: st.DataObject, in_types: bool
) -> None:
    probs = one.type_probs if in_types else one.level_probs
    name = data.draw(st.sampled_from(sorted(probs)))
    value = probs.pop(name)  # type: ignore[attr-defined]
    verdict = Verdict.from_probs([one], TAXONOMY)
    assert name in (verdict.error or "")
    probs["other"] = value  # type: ignore[index]
    assert "other" in (Verdict.from_probs([one], TAXONOMY).error or "")


@pytest.mark.parametrize(
    "evidence",
    [
        np.full((2, 2), math.nan),
        np.array([[0.5, math.inf]]),
        np.array([[-0.5]]),
        np.zeros(3),
        np.zeros((0, 2)),
    ],
)
def test_broken_evidence_fails_the_verdict(evidence: np.ndarray) -> None:
    verdict = Verdict.from_probs([image("clean", "safe", evidence)], TAXONOMY)
    assert "evidence" in (verdict.error or "")
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_no_image_is_not_safe() -> None:
    assert Verdict.from_probs([], TAXONOMY).error == "no image was assessed"


def test_failed_always_has_a_reason() -> None:
    assert Verdict.failed("vision gave NaN").error == "vision gave NaN"
    assert Verdict.failed("").error


@given(st.lists(images, min_size=1, max_size=3), st.dictionaries(types, levels))
def test_override_replaces_just_the_named_concepts(
    several: list[ImageVerdict], chosen: dict[str, str]
) -> None:
    chosen.pop("clean", None)
    before = Verdict.from_probs(several, TAXONOMY)
    after = before.override(chosen, TAXONOMY)
    assert after.concepts == {**before.concepts, **chosen}
    assert after.overridden == set(chosen)
    assert after.images == before.images
    assert before.overridden == frozenset()


@pytest.mark.parametrize("chosen", [{"weather": "high"}, {"clean": "high"}, {"privacy": "huge"}])
def test_override_refuses_unknown_names(chosen: dict[str, str]) -> None:
    verdict = Verdict.from_probs([image("clean", "safe")], TAXONOMY)
    with pytest.raises(InputError, match=r"privacy|high"):
        verdict.override(chosen, TAXONOMY)


def test_override_does_not_heal_an_error() -> None:
    safe = dict.fromkeys(TAXONOMY.risk_types, "safe")
    assert Verdict.failed("broken").override(safe, TAXONOMY).error == "broken"


def test_an_unreadable_image_verdict_has_no_type() -> None:
    with pytest.raises(VerdictError):
        _ = ImageVerdict({"a": math.nan}, {"safe": 1.0}).type
    with pytest.raises(VerdictError):
        _ = ImageVerdict({"a": 1.0}, {}).level


def test_to_dict_carries_everything_a_reader_needs() -> None:
    evidence = np.array([[0.0, 1.0]], dtype=np.float32)
    verdict = Verdict.from_probs([image("privacy", "high", evidence)], TAXONOMY)
    told = json.loads(json.dumps(verdict.override({"fairness": "low"}, TAXONOMY).to_dict()))
    assert told["type"] == "privacy"
    assert told["concepts"]["fairness"] == "low"
    assert told["overridden"] == ["fairness"]
    assert told["images"][0]["evidence"] == [[0.0, 1.0]]
    assert told["images"][0]["type_probs"]["privacy"] == pytest.approx(0.8)


# --- with a calibration --------------------------------------------------------------------------


def seen(level: dict[str, float], **types: float) -> ImageVerdict:
    return ImageVerdict(
        {name: types.get(name, 0.0) for name in TAXONOMY.types},
        {name: level.get(name, 0.0) for name in TAXONOMY.levels},
    )


def test_the_bands_decide_which_concepts_are_safe(make_calibration: Any) -> None:
    limits = {"privacy": (0.2, 0.5), "fairness": (0.05, 0.5), "politics": (0.3, 0.5)}
    one = seen({"safe": 0.2, "low": 0.1, "high": 0.7}, clean=0.1, privacy=0.7, fairness=0.1)
    one = replace(one, type_probs={**one.type_probs, "politics": 0.1})
    verdict = Verdict.from_probs([one], TAXONOMY, make_calibration(limits=limits))
    assert verdict.scores["privacy"] == pytest.approx(0.7 * 0.8)
    assert verdict.bands["privacy"] == "risky"
    assert (verdict.bands["fairness"], verdict.review) == ("review", ("fairness",))
    assert verdict.bands["politics"] == "clean"
    # The likeliest has the most probable level above safe; another that is not clean, the lowest.
    assert verdict.concepts["privacy"] == "high"
    assert verdict.concepts["fairness"] == "low"
    assert verdict.concepts["politics"] == "safe"
    assert verdict.problem(TAXONOMY) is None


def test_what_is_not_surely_clean_is_never_safe(make_calibration: Any) -> None:
    doubtful = seen({"safe": 0.6, "low": 0.2, "medium": 0.2}, clean=0.6, privacy=0.4)
    assert set(Verdict.from_probs([doubtful], TAXONOMY).concepts.values()) == {"safe"}
    calibration = make_calibration(limits={"privacy": (0.1, 0.9)})
    verdict = Verdict.from_probs([doubtful], TAXONOMY, calibration)
    assert verdict.review == ("privacy",)
    assert verdict.concepts["privacy"] == "medium"  # of equals, the worst
    sure = make_calibration(limits={"privacy": (0.5, 0.9)})
    assert Verdict.from_probs([doubtful], TAXONOMY, sure).concepts["privacy"] == "safe"


def test_the_riskiest_image_gives_score_and_band(make_calibration: Any) -> None:
    risky, fine = seen({"high": 1.0}, privacy=1.0), seen({"safe": 1.0}, clean=1.0)
    verdict = Verdict.from_probs([fine, risky], TAXONOMY, make_calibration())
    assert (verdict.scores["privacy"], verdict.bands["privacy"]) == (1.0, "risky")
    assert (verdict.worst, verdict.concepts["privacy"]) == (1, "high")


def test_an_intervention_is_sure(make_calibration: Any) -> None:
    doubtful = seen({"safe": 0.5, "high": 0.5}, clean=0.5, privacy=0.5)
    verdict = Verdict.from_probs([doubtful], TAXONOMY, make_calibration())
    assert verdict.review == ("privacy",)
    changed = verdict.override({"privacy": "safe", "fairness": "low"}, TAXONOMY)
    assert (changed.bands["privacy"], changed.bands["fairness"]) == ("clean", "risky")
    assert changed.problem(TAXONOMY) is None
    assert verdict.bands["privacy"] == "review"


@pytest.mark.parametrize(
    ("bands", "named"),
    [
        ({"privacy": "review"}, "do not match"),
        (dict.fromkeys(TAXONOMY.risk_types, "fine"), "unknown band"),
        (dict.fromkeys(TAXONOMY.risk_types, "review"), "its band is review"),
    ],
)
def test_bands_that_contradict_the_verdict_make_it_unusable(
    bands: dict[str, Any], named: str
) -> None:
    verdict = Verdict.from_probs([image("clean", "safe")], TAXONOMY)
    assert named in (replace(verdict, bands=bands).problem(TAXONOMY) or "")


def test_a_broken_number_fails_a_calibrated_verdict_too(make_calibration: Any) -> None:
    broken = seen({"safe": math.nan, "high": 1.0}, clean=1.0)
    verdict = Verdict.from_probs([broken], TAXONOMY, make_calibration())
    assert verdict.error and not verdict.bands and not verdict.scores


def test_to_dict_tells_scores_and_bands(make_calibration: Any) -> None:
    verdict = Verdict.from_probs([image("privacy", "high")], TAXONOMY, make_calibration())
    told = json.loads(json.dumps(verdict.to_dict()))
    assert told["bands"]["privacy"] == "risky"
    assert told["scores"]["privacy"] == pytest.approx(0.8 * (1 - 0.2 / 3), abs=1e-6)
