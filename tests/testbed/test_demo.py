"""The demo end to end, at a size that shows that everything is wired, not how well it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psa_vlm.inference import PsaVlm
from psa_vlm.testbed import demo


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo.SCALES, "small", demo.Scale(alignment=32, per_cell=2, seeds=2))
        demo.run_demo(folder, seed=3, scale="small")
    return folder


def test_the_scorecard_has_every_method_on_every_split(out: Path) -> None:
    card = json.loads((out / "scorecard.json").read_text())
    assert set(card) == {"rows", "seed", "commit", "seconds"}
    assert card["seed"] == [3, 4]
    methods = ["base", "system_prompt", "lora", "stage1", "stage2"]
    splits = ["compositions", "style", "objects"]
    assert sorted((r["method"], r["split"]) for r in card["rows"]) == sorted(
        (method, split) for method in methods for split in splits
    )
    for row in card["rows"]:
        assert row["n"] == 2 * 2 * 4
        verdicts = row["method"].startswith("stage")
        assert (row["type_f1"] is not None) == (row["level_f1"] is not None) == verdicts
        assert {"attack_success", "over_refusal", "lookalike_refusal", "accuracy"} <= set(row["ci"])


def test_the_report_is_one_page_with_pictures_and_curves(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "stage1: concepts" in page and "stage2: lora" in page
    assert 'src="http' not in page


def test_the_aligned_model_is_left_behind(out: Path) -> None:
    model = PsaVlm.from_pretrained(out / "stage2")
    assert model.adapter is not None
    assert len(model.backbone.safety_token_ids) > 0


def test_a_finished_demo_is_not_run_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SCALES, "small", demo.Scale(alignment=32, per_cell=2, seeds=2))
    monkeypatch.setattr(demo, "_methods", lambda *arguments: pytest.fail("trained again"))
    demo.run_demo(out, seed=3, scale="small")
