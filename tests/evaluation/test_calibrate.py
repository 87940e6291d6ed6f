"""A calibration made from samples: its promise, its errors, its page, its command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError, InputError
from psa_vlm.evaluation.calibrate import (
    Promise,
    Readings,
    band_shares,
    calibrate,
    fit_temperatures,
    fit_thresholds,
    read,
)
from psa_vlm.inference import PsaVlm
from psa_vlm.model.calibration import FILE, Calibration, Temperatures
from psa_vlm.taxonomy import Taxonomy

from ..conftest import Psa

WORDS = Taxonomy(("privacy", "clean", "fairness"), ("safe", "low", "high"), "clean")
LAX = Promise(0.4, 0.4, 0.8)
"""Kept with four samples of each type."""


def population(n: int, seed: int = 0) -> Readings:
    """Logits that favour the right names, three times as sure as they should be."""
    rng = np.random.default_rng(seed)
    type_ids, level_ids = rng.integers(0, 3, n), rng.integers(0, 3, n)
    types = rng.normal(size=(n, 3)) + 2.0 * np.eye(3)[type_ids]
    levels = rng.normal(size=(n, 3)) + 2.0 * np.eye(3)[level_ids]
    return Readings(3 * types, 3 * levels, type_ids, level_ids)


def test_the_promise_holds_over_recalibrations() -> None:
    """Temperatures and thresholds anew each time, the truth taken from all of the population."""
    everyone, promise, rounds = population(20_000), Promise(0.05, 0.1, 0.9), 120
    rng = np.random.default_rng(1)
    missed: dict[str, list[float]] = {"privacy": [], "fairness": []}
    refused = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(everyone.type_ids), 1200)
        temperatures = fit_temperatures(everyone.take(drawn[:240]))
        thresholds = fit_thresholds(
            everyone.take(drawn[240:]).divided(temperatures), WORDS, promise
        )
        now = everyone.divided(temperatures)
        shares = band_shares(now.scores(WORDS), now.groups(WORDS), thresholds, WORDS)
        for name, values in missed.items():
            values.append(shares[name]["clean"])
        refused.append(shares["clean"]["risky"])
    spread = 3 * (0.1 * 0.9 / rounds) ** 0.5
    for values in missed.values():
        assert np.mean(np.array(values) > promise.miss_rate) <= 0.1 + spread
        assert np.mean(values) > promise.miss_rate / 5  # kept by a bound, not by flagging all
    assert np.mean(np.array(refused) > promise.false_refusal) <= 0.1 + spread


def test_temperatures_undo_overconfidence() -> None:
    found = fit_temperatures(population(4000))
    # With noise of variance 1 and a mean of 2, the honest logits are 2 x features; these are 3 x.
    assert found.type == pytest.approx(1.5, rel=0.1)
    assert found.level == pytest.approx(1.5, rel=0.1)


def test_who_is_risky_and_who_is_harmless() -> None:
    labels = [("privacy", "low"), ("privacy", "safe"), ("clean", "high"), ("fairness", "high")]
    readings = Readings(
        np.zeros((4, 3)),
        np.zeros((4, 3)),
        np.array([WORDS.type_id(type_) for type_, _ in labels]),
        np.array([WORDS.level_id(level) for _, level in labels]),
    )
    groups = {name: rows.tolist() for name, rows in readings.groups(WORDS).items()}
    assert groups["privacy"] == [True, False, False, False]
    assert groups["fairness"] == [False, False, False, True]
    assert groups["clean"] == [False, True, True, False]
    assert readings.scores(WORDS)["privacy"] == pytest.approx([1 / 3 * 2 / 3] * 4)


def test_where_no_band_is_needed_doubt_is_a_risk() -> None:
    clear = population(6000)
    clear = Readings(clear.types * 20, clear.levels * 20, clear.type_ids, clear.level_ids)
    clear.types[:] = 40 * np.eye(3)[clear.type_ids]
    clear.levels[:] = 40 * np.eye(3)[clear.level_ids]
    for limits in fit_thresholds(clear, WORDS, Promise()).values():
        assert limits.clean_below == limits.risky_above < 0.01


@pytest.mark.parametrize("name", ["miss_rate", "false_refusal", "confidence"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_a_promise_is_between_0_and_1(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name.replace("_", " ")):
        Promise(**{name: value})


# --- on the tiny model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Of each type ten risky samples; ten harmless ones."""
    rng, words = np.random.default_rng(0), Taxonomy.default()
    found = []
    for i in range(70):
        type_ = words.types[i % 7]
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        turns = (Turn("user", "What is this?"), Turn("assistant", "A thing."))
        level = "safe" if type_ == words.clean else "high"
        found.append(Sample(f"s{i}", (Image.fromarray(pixels),), turns, type_, level))
    return found


@pytest.fixture(scope="module")
def made(model: PsaVlm, samples: list[Sample]) -> Calibration:
    return calibrate(model, samples, LAX, valid_days=30, today=date(2026, 3, 1))


def test_a_calibration_says_what_it_rests_on(made: Calibration, model: PsaVlm) -> None:
    made.check(model.taxonomy, model.bottleneck)
    assert sum(made.samples.values()) == 70
    assert sum(made.n.values()) == made.samples["thresholds"] == 56
    assert (made.made, made.valid_until) == (date(2026, 3, 1), date(2026, 3, 31))
    assert (made.miss_rate, made.false_refusal, made.confidence) == (0.4, 0.4, 0.8)
    for change in made.quality.values():
        assert sum(change.after.n) == 56
    assert all(shares["clean"] <= 0.4 for name, shares in made.shares.items() if name != "clean")
    assert made.shares["clean"]["risky"] <= 0.4


def test_the_same_samples_give_the_same_calibration(
    made: Calibration, model: PsaVlm, samples: list[Sample]
) -> None:
    again = calibrate(model, samples, LAX, valid_days=30, today=date(2026, 3, 1))
    assert again == made
    assert calibrate(model, samples[::-1], LAX).data != made.data


def test_a_model_that_is_calibrated_already_is_read_without_it(
    made: Calibration, model: PsaVlm, samples: list[Sample]
) -> None:
    hot = made.model_copy(update={"temperatures": Temperatures(type=9.0, level=9.0)})
    parts = (model.backbone, model.bottleneck, model.taxonomy, model.policy)
    calibrated = PsaVlm(*parts, calibration=hot)
    one, other = (read(which, samples[:3]) for which in (model, calibrated))
    assert np.array_equal(one.types, other.types) and np.array_equal(one.levels, other.levels)


def test_inference_has_the_scores_that_the_thresholds_were_made_from(
    made: Calibration, model: PsaVlm, samples: list[Sample]
) -> None:
    scores = read(model, samples[:4]).divided(made.temperatures).scores(model.taxonomy)
    parts = (model.backbone, model.bottleneck, model.taxonomy, model.policy)
    calibrated = PsaVlm(*parts, calibration=made)
    for i, sample in enumerate(samples[:4]):
        verdict = calibrated.assess(list(sample.images), sample.question)
        expected = {name: values[i] for name, values in scores.items()}
        assert dict(verdict.scores) == pytest.approx(expected, abs=1e-5)


def test_too_few_samples_say_how_many_each_type_needs(
    model: PsaVlm, samples: Sequence[Sample]
) -> None:
    with pytest.raises(
        DataError, match=r"privacy has \d+ and needs 299.*harmless has \d+ and"
    ) as e:
        calibrate(model, samples)
    assert "\n" not in str(e.value)
    without = [one for one in samples if one.type != "fairness"]
    with pytest.raises(DataError, match=r": fairness has 0 and needs 4; that is besides the 20%"):
        calibrate(model, without, LAX)


def test_unlabelled_and_several_pictures_are_named(
    model: PsaVlm, samples: Sequence[Sample]
) -> None:
    one = samples[0]
    unlabelled = Sample("bare", one.images, one.conversation)
    with pytest.raises(DataError, match="bare"):
        calibrate(model, [*samples, unlabelled], LAX)
    twice = Sample("pair", one.images * 2, one.conversation, one.type, one.level)
    with pytest.raises(DataError, match=r"pair.*several pictures"):
        read(model, [twice])


def write(samples: Sequence[Sample], folder: Path) -> Path:
    """The samples in the authors' format."""
    words, rows = Taxonomy.default(), []
    for sample in samples:
        sample.images[0].save(folder / f"{sample.id}.png")  # type: ignore[union-attr]
        talk = [{"from": t.role.upper(), "value": t.text} for t in sample.conversation]
        labels = {
            "safe_type": words.type_id(sample.type or ""),
            "safe_level": words.level_id(sample.level or ""),
        }
        rows.append({**labels, "image": f"{sample.id}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def test_the_command_leaves_calibration_and_page_and_prints_both_ways(
    model: PsaVlm,
    samples: Sequence[Sample],
    picture: Path,
    tmp_path: Path,
    psa: Psa,
) -> None:
    run = tmp_path / "run"
    model.save_pretrained(run)
    (run / FILE).write_text("a damaged one is no hindrance")
    data = write(samples, tmp_path)
    given = ["--data", data, "--confidence", 0.8]
    lax = [*given, "--miss-rate", 0.4, "--false-refusal", 0.4]
    code, shown, _ = psa("calibrate", run, *lax)
    assert code == 0
    assert "illegal risk" in shown and "harmless" in shown and "80% confidence" in shown
    calibrated = PsaVlm.from_pretrained(run)
    assert calibrated.calibration is not None and calibrated.calibration.n["privacy"] >= 4
    assert calibrated.assess(picture, "Hi").bands
    page = (run / "calibration.html").read_text("utf-8")
    for part in ("type-before", "type-after", "level-before", "level-after"):
        assert f'id="{part}"' in page and f'"{part}"' in page
    assert calibrated.calibration.data in page and "http-equiv" in page
    assert "of each type at most 40.0% missed" in (run / "README.md").read_text("utf-8")
    exported = tmp_path / "exported"
    model.save_pretrained(exported, merged=True)
    code, shown, _ = psa("calibrate", exported, *lax, "--json")
    assert code == 0
    assert PsaVlm.from_pretrained(exported).calibration is not None
    assert json.loads(shown)["miss_rate"] == 0.4
    code, _, problem = psa("calibrate", run, *given)
    assert code == 2 and "needs 161" in problem  # 1% at 80%
