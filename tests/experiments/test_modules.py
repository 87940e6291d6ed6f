"""The modules one by one: what is read of them, and figures of made-up readings."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from psa_vlm.experiments import modules
from psa_vlm.experiments.modules import (
    Scale,
    by_variant,
    classes_of,
    heat,
    named,
    probed,
    recalls,
    scattered,
)
from psa_vlm.experiments.readings import VARIANTS, Readings, class_samples, even_samples, read
from psa_vlm.inference import PsaVlm
from psa_vlm.taxonomy import Taxonomy

WORDS = Taxonomy.default()


@pytest.fixture(scope="module")
def model(run_dir: Path) -> PsaVlm:
    return PsaVlm.from_pretrained(run_dir)


def test_what_is_read_is_what_the_model_says(model: PsaVlm) -> None:
    samples = even_samples("compositions", 9, seed=0)
    found = read(model, samples, seed=0)
    verdicts = model.assess_batch([s.images for s in samples], [s.question for s in samples])
    for row, verdict in enumerate(verdicts):
        (image,) = verdict.images
        assert found.types[row] == pytest.approx(list(image.type_probs.values()), abs=1e-5)
        assert found.levels[row] == pytest.approx(list(image.level_probs.values()), abs=1e-5)
        assert found.safe[row, 0] == pytest.approx(image.level_probs["safe"], abs=1e-5)
    head = model.bottleneck.head
    pooled = torch.from_numpy(found.pooled).float()
    with torch.inference_mode():
        assert head.to_type(pooled).softmax(-1).numpy() == pytest.approx(found.types, abs=1e-5)
    assert found.vision.shape == (9, 24) and found.safety.shape == (9, 32)
    assert [WORDS.types[int(i)] for i in found.type_ids] == [s.type for s in samples]
    assert ((found.on_tokens > 0) & (found.on_tokens < 1)).all()


def test_taken_out_the_tokens_do_not_matter(model: PsaVlm) -> None:
    samples = even_samples("compositions", 3, seed=0)
    before = read(model, samples, seed=0)
    kept = model.bottleneck.tokens.detach().clone()
    try:
        with torch.no_grad():
            model.bottleneck.tokens.mul_(50).add_(3)
        after = read(model, samples, seed=0)
    finally:
        with torch.no_grad():
            model.bottleneck.tokens.copy_(kept)
    same = [np.allclose(before.safe[:, i], after.safe[:, i]) for i in range(len(VARIANTS))]
    assert dict(zip(VARIANTS, same, strict=True)) == {
        "as trained": False,
        "taken out": True,
        "zero": True,
        "untrained": True,
    }
    assert not np.allclose(before.safe[:, 1], before.safe[:, 2])


def test_types_are_even_and_no_set_of_things_is_on_both_sides(model: PsaVlm) -> None:
    samples = even_samples("compositions", 70, seed=0)
    assert set(Counter(one.type for one in samples).values()) == {10}
    side = read(model, samples, seed=0).side
    shown = [
        {s.tags["things"] for s, at in zip(samples, side, strict=True) if at == i} for i in (0, 1)
    ]
    assert not shown[0] & shown[1]
    assert 20 < side.sum() < 50


def test_every_type_stands_at_every_level() -> None:
    drawn = class_samples(4, seed=0)
    counts = Counter((one.type, one.level) for one in drawn)
    assert all(counts[one] == 4 for one in classes_of(WORDS) if one[0] != "clean")
    assert sum(one.level == "safe" for one in drawn) == 4
    assert counts["clean", "safe"] == 2 and len(drawn) == 19 * 4


def readings(type_ids: list[int], level_ids: list[int], seed: int = 0) -> Readings:
    """The pooled features tell the type, the vision features nothing; the head is always right."""
    n, rng = len(type_ids), np.random.default_rng(seed)
    pooled = np.eye(7)[type_ids] + rng.normal(0, 0.05, (n, 7))
    safe = np.array([1.0 if level == 0 else 0.0 for level in level_ids])
    return Readings(
        vision=rng.normal(size=(n, 5)),
        safety=rng.normal(size=(n, 7)),
        pooled=pooled,
        types=np.eye(7)[type_ids],
        levels=np.eye(4)[level_ids],
        safe=np.stack([safe, 1 - safe, np.full(n, 0.5), safe], 1),
        on_tokens=np.full(n, 0.25),
        type_ids=np.array(type_ids, dtype=float),
        level_ids=np.array(level_ids, dtype=float),
        side=np.arange(n) % 2.0,
    )


def test_a_probe_is_told_apart_from_guessing() -> None:
    ids = [i // 2 % 7 for i in range(280)]
    even = {"compositions": readings(ids, [0] * 280), "style": readings(ids, [0] * 280, 1)}
    table = probed(even, "type", WORDS.types)  # type: ignore[arg-type]
    assert table.header == ["from", "width", "compositions", "style"]
    assert table.caption == "A linear probe tells the type (trained on 140 others)"
    vision, _, pooled, guessed, n = table.rows
    assert pooled[1] == 7 and pooled[2].value == 1 and pooled[2].n == 140  # type: ignore[union-attr]
    assert vision[2].value < 0.3 and guessed[2].value == 1 / 7  # type: ignore[union-attr]
    assert list(n) == ["n", None, 140, 140]


@pytest.fixture()
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "separation", partial(modules.separation, draws=50))


def test_separation_with_and_without_the_tokens(few_draws: None) -> None:
    levels = [0, 3] * 30
    table, notes = by_variant({"objects": readings([1] * 60, levels)})
    rows = {row[0]: row for row in table.rows}
    areas = {name: rows[name][1].value for name in VARIANTS}  # type: ignore[union-attr]
    assert areas == {"as trained": 1, "taken out": 0, "zero": 0.5, "untrained": 1}
    assert rows["taken out"][-1].value == -1 and rows["n"][1:3] == [60, 60]  # type: ignore[union-attr]
    assert rows["of them safe"][1] == 30
    assert notes[0] == "Safety tokens (1) taken out: AUROC -100.0 (-100.0 to -100.0) points."
    assert "can't tell from none" in notes[2]
    assert notes[3].startswith("Of the head's attention, 25.0%")


def test_classes_and_confusion() -> None:
    assert named(np.array([0, 6, 4]), np.array([0, 3, 2]), WORDS) == [
        ("clean", "safe"),
        ("clean", "safe"),
        ("privacy", "medium"),
    ]
    pairs = [(t, level) for t in range(6) for level in (1, 2, 3)] + [(6, 0)]
    found = readings([t for t, _ in pairs] * 10, [level for _, level in pairs] * 10)
    for row in (0, 19):  # politics, low: twice taken for privacy, low
        found.types[row] = np.eye(7)[4]
    found.levels[18] = np.eye(4)[2]  # clean at a level is harmless all the same
    table, notes = recalls(found, WORDS)
    assert len(table.rows) == 19
    first, last = table.rows[0], table.rows[-1]
    assert first[0] == "politics, low" and first[1] == 10
    values = [None if cell is None else cell.value for cell in first[2:]]  # type: ignore[union-attr]
    assert values == [0.8, 0.8, 1, 0]
    assert last[0] == "harmless" and last[2].value == 1  # type: ignore[union-attr]
    assert notes[0].startswith("Recognised the least: politics, low, 80.0%")
    assert notes[1] == "Most often confused: politics, low taken for privacy, low, 2 times."
    (cells,) = heat(found, WORDS)["data"]
    place = cells["x"].index("privacy, low")
    assert cells["z"][0][0] == 0.8 and cells["z"][0][place] == 0.2
    assert [sum(row) for row in cells["z"]] == pytest.approx([1] * 19)
    assert cells["hovertext"][0][place] == "politics, low taken for privacy, low: 2 of 10"


def test_a_plot_has_a_colour_for_each_type() -> None:
    found = readings([i % 7 for i in range(28)], [0] * 28)
    figure = scattered(found.pooled, found.type_ids, WORDS, seed=0)
    assert [one["name"] for one in figure["data"]][-1] == "clean"
    assert len({one["marker"]["color"] for one in figure["data"]}) == 7
    assert [len(one["x"]) for one in figure["data"]] == [4] * 7


def test_a_tiny_run_from_end_to_end(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_draws: None
) -> None:
    monkeypatch.setitem(modules.SCALES, "small", Scale(14, 2, 1))
    page = modules.run(tmp_path, "small", 0, run_dir)
    assert len(page.tables) == 4 and len(page.plots) == 4
    assert page.notes[0].startswith("The head was trained with its safety tokens (1)")
    monkeypatch.setattr(modules, "read", None)  # all was read
    assert modules.run(tmp_path, "small", 0, run_dir) == page
