"""Cases for alignment and evaluation: right labels, and no leak from one to the other."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from psa_vlm.data.readers import read_psa
from psa_vlm.evaluation.scorers import is_refusal
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.cases import (
    CELLS,
    FOREIGN,
    OWN,
    SPLITS,
    Cell,
    Split,
    alignment_samples,
    draw_sample,
    evaluation_samples,
    write_samples,
)
from psa_vlm.testbed.world import world


def test_alignment_never_shows_unseen_kinds_wordings_or_the_held_out_style() -> None:
    unseen = {kind.name for kind in world().kinds.values() if kind.unseen}
    wordings = [w for risk in world().risk_types for w in world().wordings(risk, unseen=True)]
    questions = {wording.format(x="this") for wording in wordings}
    for sample in alignment_samples(400, seed=0):
        assert sample.tags["thing"] not in unseen
        assert sample.tags["style"] in world().table["styles"]["train"]
        assert sample.question not in questions


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_behaves_as_its_name_says(split: Split, cell: Cell) -> None:
    for sample in evaluation_samples(split, cell, 40, seed=0):
        refused = is_refusal(sample.answer or "")
        assert refused == (cell == "risky")
        assert (sample.level in ("medium", "high")) == refused
        if cell == "harmless":
            assert sample.type == "clean"
        if cell in ("risky", "lookalike"):
            assert sample.type != "clean"
            assert world().kinds[sample.tags["thing"]].unseen == (split == "objects")
        assert (sample.tags["style"] == world().table["styles"]["held_out"]) == (split == "style")


def test_a_mix_is_what_is_drawn() -> None:
    cells = {sample.tags["cell"] for sample in alignment_samples(30, 0, mix={"vqa": 1.0})}
    assert cells == {"vqa"}
    cells = {sample.tags["cell"] for sample in alignment_samples(60, 0)}
    assert cells == set(CELLS)


def test_the_same_seed_draws_the_same_and_another_seed_other_cases() -> None:
    def shown(seed: int) -> list[tuple[str, bytes]]:
        samples = alignment_samples(20, seed)
        return [(sample.question, sample.images[0].tobytes()) for sample in samples]  # type: ignore[union-attr]

    assert shown(1) == shown(1)
    assert shown(1) != shown(2)


def test_written_samples_read_back_with_the_same_labels(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 12, seed=5)
    drawn, read = alignment_samples(12, 5), read_psa(path, taxonomy=Taxonomy.default())
    assert [(s.type, s.level, s.question, s.answer) for s in read] == [
        (s.type, s.level, s.question, s.answer) for s in drawn
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_a_wished_case_is_what_was_wished(split: Split) -> None:
    rng = Random(0)
    for risk, asked, setting, level, cell in (
        ("privacy", OWN, "alone", "high", "risky"),
        ("privacy", OWN, "companion", "medium", "risky"),
        ("fairness", "ask", "alone", "low", "lookalike"),
        (None, FOREIGN, "person", "safe", "harmless"),
        (None, OWN, "alone", "safe", "harmless"),
        (None, "describe", "person", "safe", "vqa"),
    ):
        for sign in (True, False):
            one = draw_sample(rng, split, "x", risk, asked, setting, sign)
            assert (one.type, one.level) == (risk or "clean", level)
            assert (one.tags["cell"], one.tags["setting"]) == (cell, setting)
            assert (one.tags["sign"] in world().table["signs"]) == sign
            assert ("sign" in one.tags["things"].split("+")) == sign
            assert is_refusal(one.answer or "") == (cell == "risky")
            assert ("harmful" in one.tags) == (cell == "risky")
            if asked == OWN and risk:
                assert one.tags["request"] == risk
            if asked == FOREIGN:
                assert one.tags["request"] in world().risk_types
    read = draw_sample(rng, split, "x", None, "describe", sign=True, question="read")
    assert read.answer == f"The sign says {read.tags['sign']}."
