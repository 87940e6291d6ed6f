"""The experiment on the ratio: the scenes that it draws, and what it says of made-up results."""

from __future__ import annotations

from pathlib import Path

import pytest

from psa_vlm.experiments import ratio
from psa_vlm.experiments.arms import Arm
from psa_vlm.experiments.ratio import RULE, Line, Scale, draw
from psa_vlm.testbed.world import world

from .conftest import Make


def test_so_many_risky_and_clean_scenes_are_drawn_and_larger_sets_hold_smaller_ones() -> None:
    small, large = draw(9, 3, seed=1), draw(12, 30, seed=1)
    assert [one.type == "clean" for one in small] == [False] * 9 + [True] * 3
    assert sum(one.type == "clean" for one in large) == 30
    ids = [one.id for one in large]
    assert len(set(ids)) == len(ids) and {one.id for one in small} <= set(ids)
    cells = {one.tags["cell"] for one in draw(40, 0, seed=1)}
    assert cells == {"risky", "lookalike", "vqa"}
    assert {one.tags["cell"] for one in draw(0, 40, seed=1)} == {"harmless", "vqa"}
    assert [one.id for one in draw(9, 3, seed=2)] != [one.id for one in small]


def test_the_rule_is_one_risk_type() -> None:
    assert pytest.approx(1 / len(world().risk_types)) == RULE


def test_the_page_says_where_the_best_is_and_whether_the_rule_is_near(records: Make) -> None:
    near, far, best = Line(100), Line(300), Line(1000)
    page = ratio.page(
        {
            **{(near, at): records(20, risky=wrong) for at, wrong in ((RULE, 4), (1.0, 2))},
            **{(far, at): records(20, wrong) for at, wrong in ((RULE, 12), (1.0, 1))},
            **{(best, at): records(20, wrong) for at, wrong in ((RULE, 0), (1.0, 4))},
        }
    )
    handled = [note for note in page.notes if "handled rightly" in note]
    assert "100 risky: handled rightly is best at 1, 97.5%" in handled[0]
    assert "the paper's rule, 0.17, has 95.0%" in handled[0] and "within" in handled[0]
    assert "-2.5 (" in handled[0]
    assert "40.0%" in handled[1] and "below that interval" in handled[1]
    assert handled[2].endswith("which is the paper's rule.")
    assert sum("type F1" in note for note in page.notes) == 3
    _, header, rows = page.tables[0]
    assert len(page.tables) == 4 and len(page.plots) == 7 and len(rows) == 6
    first = dict(zip(header, rows[0], strict=True))
    assert (first["scenes"], first["clean"], first["n"]) == ("100 risky", 17, 240)
    assert page.plots[0][1]["layout"]["xaxis"]["type"] == "log"


def test_a_line_says_how_it_is_trained() -> None:
    assert Line(300).arm == Arm(("concepts.class_balance=false",))
    assert Line(300, balanced=True).arm == Arm(("concepts.class_balance=true",))
    assert Line(300, balanced=True).name == "300 risky, classes weighed"


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ratio.SCALES, "small", Scale((Line(6),), (RULE,), per_cell=1, seeds=1))
    quick = ("concepts.epochs=1", "concepts.class_balance=false", "tokens.epochs=0")
    monkeypatch.setattr(Line, "arm", Arm(quick, ("lora.epochs=1",)))
    page = ratio.run(tmp_path, "small", seed=3)
    assert [row[2] for row in page.tables[0][2]] == [1]
    monkeypatch.setattr(ratio, "draw", lambda *arguments: pytest.fail("trained again"))
    assert ratio.run(tmp_path, "small", seed=3) == page
