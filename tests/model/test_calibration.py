"""A calibration on disk: what is saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

from psa_vlm.errors import CheckpointError, TaxonomyMismatch
from psa_vlm.inference import PsaVlm
from psa_vlm.model.calibration import FILE, Calibration
from psa_vlm.taxonomy import Taxonomy


def test_what_is_saved_comes_back(make_calibration: Any, tmp_path: Path) -> None:
    one = make_calibration(limits={"privacy": (0.1 + 0.2, 0.7)}, weights=[1 / 3, -2e-7])
    one.save(tmp_path / FILE)
    assert Calibration.load(tmp_path / FILE) == one


def test_the_bands_and_their_edges(make_calibration: Any) -> None:
    one = make_calibration(limits={"privacy": (0.2, 0.6), "fairness": (0.5, 0.5)})
    expected = {0.0: "clean", 0.19: "clean", 0.2: "review", 0.6: "review", 0.61: "risky"}
    assert {score: one.band("privacy", score) for score in expected} == expected
    assert [one.band("fairness", score) for score in (0.49, 0.51)] == ["clean", "risky"]
    assert one.band("privacy", math.nan) == "risky"


def test_a_run_gives_calibrated_verdicts_as_soon_as_it_has_the_file(
    run: Path, picture: Path, make_calibration: Any
) -> None:
    plain = PsaVlm.from_pretrained(run)
    assert plain.calibration is None
    before = plain.assess(picture, "Hi")
    assert not before.bands and not before.scores and not before.review
    temperatures = {"type": 2.0, "level": 0.5}
    make_calibration(plain.bottleneck, temperatures=temperatures).save(run / FILE)
    after = PsaVlm.from_pretrained(run).assess(picture, "Hi")
    for head, t in temperatures.items():
        raw = torch.tensor(list(getattr(before.images[0], f"{head}_probs").values())).double()
        expected = (raw.log() / t).softmax(0).tolist()
        found = list(getattr(after.images[0], f"{head}_probs").values())
        assert found == pytest.approx(expected, abs=1e-6)
    image = after.images[0]
    risk = image.type_probs["privacy"] * (1 - image.level_probs["safe"])
    assert after.scores["privacy"] == pytest.approx(risk)
    assert after.bands.keys() == after.scores.keys()
    assert PsaVlm.from_pretrained(run, calibrated=False).assess(picture, "Hi") == before


def test_a_saved_model_keeps_its_calibration(
    run: Path, make_calibration: Any, tmp_path: Path
) -> None:
    one = make_calibration(PsaVlm.from_pretrained(run).bottleneck)
    one.save(run / FILE)
    PsaVlm.from_pretrained(run).save_pretrained(tmp_path / "again")
    assert Calibration.load(tmp_path / "again" / FILE) == one


def test_a_calibration_of_other_weights_is_refused(run: Path, make_calibration: Any) -> None:
    model = PsaVlm.from_pretrained(run)
    one = make_calibration(model.bottleneck)
    with torch.no_grad():  # one step of further training
        for weight in model.bottleneck.parameters():
            weight += 1e-5
    model.calibration = one
    with pytest.raises(CheckpointError, match=r"other weights.*calibrate"):
        model.save_pretrained(run)
    model.calibration = None
    model.save_pretrained(run)
    one.save(run / FILE)
    with pytest.raises(CheckpointError, match=r"other weights.*calibrate"):
        PsaVlm.from_pretrained(run)
    PsaVlm.from_pretrained(run, calibrated=False)


def test_a_calibration_of_another_taxonomy_is_refused(run: Path, make_calibration: Any) -> None:
    bottleneck = PsaVlm.from_pretrained(run).bottleneck
    other = Taxonomy(("weapons", "clean"), ("safe", "high"), "clean")
    make_calibration(bottleneck, taxonomy=other.hash).save(run / FILE)
    with pytest.raises(TaxonomyMismatch):
        PsaVlm.from_pretrained(run)
    made = make_calibration(bottleneck)
    lacking = {name: one for name, one in made.thresholds.items() if name != "privacy"}
    made.model_copy(update={"thresholds": lacking}).save(run / FILE)
    with pytest.raises(CheckpointError, match="thresholds must be given for exactly"):
        PsaVlm.from_pretrained(run)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format"),
        ({"extra": 1}, "extra"),
        ({"temperatures": {"type": 0.0}}, "temperatures.type"),
        ({"thresholds": {"privacy": {"clean_below": 0.9, "risky_above": 0.1}}}, "clean_below"),
        ({"thresholds": {"privacy": {"clean_below": None, "risky_above": 1}}}, "clean_below"),
    ],
)
def test_a_damaged_file_is_never_read_as_no_calibration(
    run: Path, make_calibration: Any, change: dict[str, Any], named: str
) -> None:
    one = make_calibration(PsaVlm.from_pretrained(run).bottleneck)
    (run / FILE).write_text(json.dumps({**one.model_dump(mode="json"), **change}))
    with pytest.raises(CheckpointError, match=named) as caught:
        PsaVlm.from_pretrained(run)
    assert "\n" not in str(caught.value)
    (run / FILE).write_text(one.to_json()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        PsaVlm.from_pretrained(run)


def test_a_full_disk_leaves_the_old_file(
    make_calibration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_calibration()
    old.save(tmp_path / FILE)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        make_calibration(miss_rate=0.5).save(tmp_path / FILE)
    assert Calibration.load(tmp_path / FILE) == old
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_calibration_past_its_day_is_used_and_said(
    run: Path, make_calibration: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old = make_calibration(PsaVlm.from_pretrained(run).bottleneck, valid_until=date(2026, 1, 2))
    old.save(run / FILE)
    with caplog.at_level(logging.WARNING):
        assert PsaVlm.from_pretrained(run).calibration == old
    assert "was valid until 2026-01-02" in caplog.text
