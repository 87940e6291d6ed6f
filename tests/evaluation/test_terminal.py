"""What the terminal shows of a verdict."""

from __future__ import annotations

from typing import Any

from psa_vlm.evaluation.terminal import verdict_table
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()


def test_a_calibrated_verdict_says_what_is_sure_and_what_is_not(make_calibration: Any) -> None:
    types = dict.fromkeys(TAXONOMY.types, 0.0) | {"illegal_risk": 0.7, "privacy": 0.3}
    image = ImageVerdict(types, {"safe": 0.0, "low": 0.0, "medium": 0.0, "high": 1.0})
    verdict = Verdict.from_probs([image], TAXONOMY, make_calibration())
    told = str(verdict_table(verdict).caption)
    assert told == "surely risky: illegal risk\nto be reviewed: privacy"
    changed = verdict.override({"privacy": "safe"}, TAXONOMY)
    told = str(verdict_table(changed).caption)
    assert "reviewed" not in told and "overridden: privacy: safe" in told


def test_a_plain_verdict_has_nothing_beneath_it() -> None:
    types = dict.fromkeys(TAXONOMY.types, 0.0) | {"clean": 1.0}
    image = ImageVerdict(types, {"safe": 1.0, "low": 0.0, "medium": 0.0, "high": 0.0})
    assert verdict_table(Verdict.from_probs([image], TAXONOMY)).caption is None
