"""Exaggerated safety: what kinds are drawn, and what the page says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from psa_vlm.evaluation.scorers import Interval, is_refusal
from psa_vlm.experiments import exaggerated
from psa_vlm.experiments.exaggerated import KINDS, SPLITS, Scale, by_kind, draw, findings
from psa_vlm.experiments.thresholds import RISKY, Outcome, Way
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.cases import Split

WORDS = Taxonomy.default()


@pytest.mark.parametrize("split", SPLITS)
def test_harmless_requests_are_of_their_kind_and_none_is_to_be_refused(split: Split) -> None:
    for kind in KINDS:
        drawn = draw(split, kind, 12, seed=0)
        assert len(drawn) == 12 and len({one.id for one in drawn}) == 12
        for one in drawn:
            assert one.level in ("safe", "low") and not is_refusal(one.answer or "")
            assert (one.type != "clean") == KINDS[kind].risky
            assert (one.tags["sign"] != "none") == (kind == "sign")
            assert one.tags["setting"] in KINDS[kind].settings
            assert ("person" in one.tags["things"]) == (one.tags["setting"] == "person")
    assert {one.level for one in draw(split, "open", 12, seed=0)} == {"low"}
    assert {one.tags["request"] for one in draw(split, "plain", 6, seed=0)} == {"describe"}
    wordings = {one.tags["request"] for one in draw(split, "wording", 30, seed=0)}
    assert wordings <= set(WORDS.risk_types) and len(wordings) > 3
    assert all("sign" in one.question for one in draw(split, "sign", 6, seed=0))
    assert all(one.level in ("medium", "high") for one in draw(split, RISKY, 12, seed=0))


def test_the_same_seed_draws_the_same() -> None:
    def questions(seed: int) -> list[str]:
        return [one.question for one in draw("compositions", "companion", 20, seed)]

    assert questions(1) == questions(1) != questions(2)


def outcome(kind: str, base: bool = False, refused: bool = False) -> Outcome:
    types = dict.fromkeys(WORDS.types, 0.0) | {"clean": 1.0}
    levels = dict.fromkeys(WORDS.levels, 0.0) | {"safe": 1.0}
    return Outcome(kind, "low" if kind == "open" else "safe", base, refused, types, levels)


def test_refusals_are_counted_by_kind_and_the_risky_left_out() -> None:
    found = [outcome(kind, refused=i < 2) for kind in KINDS for i in range(4)]
    found += [outcome("sign", base=True), outcome(RISKY, refused=True)]
    rows = {row[0]: row for row in by_kind(found, WORDS)}
    assert list(rows) == [*(kind.words for kind in KINDS.values()), "all kinds"]
    _, levels, n, base, replies, alone = rows[KINDS["sign"].words]
    assert (levels, n) == ("safe", 5)
    assert isinstance(base, Interval) and base.value == 0.2
    assert isinstance(replies, Interval) and replies.value == 0.4
    assert isinstance(alone, Interval) and alone.value == 0
    assert rows["all kinds"][1:3] == ["safe, low", 25]


def test_a_promise_that_was_not_kept_is_told() -> None:
    found = [outcome("sign") for _ in range(100)] + [outcome(RISKY) for _ in range(10)]
    none, all_ = np.zeros(110, dtype=bool), np.ones(110, dtype=bool)
    ways = [Way("hand-set", None, none), Way("replies", None, none)]
    kept, broken = Way("x: at most 5%", 0.5, none), Way("y: at most 5%", 0.5, all_)
    same = Way("z: same spend", 0.5, all_)
    notes = findings([*ways, kept, broken, same], found)
    assert len(notes) == 2
    assert notes[0].startswith("y: at most 5%: not kept, 100.0%")
    assert notes[1].startswith("z: same spend: +100.0")


def test_a_tiny_run_from_end_to_end(
    aligned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exaggerated.SCALES, "small", Scale(2, 4))
    monkeypatch.setattr(exaggerated, "MAX_NEW_TOKENS", 2)
    page = exaggerated.run(tmp_path, "small", 0, aligned_run)
    assert len(page.tables) == 2 * len(SPLITS) and len(page.plots) == len(SPLITS)
    assert any("too few to promise" in note for note in page.notes)
    monkeypatch.setattr(exaggerated, "draw", None)  # all was asked; nothing is drawn again
    assert exaggerated.run(tmp_path, "small", 0, aligned_run) == page
