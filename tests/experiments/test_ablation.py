"""The ablation: that its arms are what they are called, and what it says of made-up results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from psa_vlm.experiments import ablation
from psa_vlm.experiments.ablation import ARMS, WHOLE, Scale
from psa_vlm.experiments.arms import Arm
from psa_vlm.experiments.page import Change
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.demo import configs

from .conftest import Make


def test_every_arm_is_a_configuration_and_lacks_what_it_says() -> None:
    made = {
        name: configs(Path("one"), Path("two"), 0, arm.stage1, arm.stage2 or ())[0]
        for name, arm in ARMS.items()
    }
    whole = made[WHOLE]
    assert whole.concepts.projector == "abstractor" and whole.concepts.pooling == "text"
    assert made["without safety projector"].concepts.projector == "linear"
    assert made["without safety tokens (1)"].concepts.tokens == 0
    assert made["without safety tokens (2)"].tokens.count == 0
    assert made["without cross-attention"].concepts.pooling == "none"
    assert made["text read at its first position"].concepts.pooling == "first"
    assert ARMS["without stage II"].stage2 is None
    policy = made["without hints"].policy
    assert policy is not None
    hintless = Policy.from_yaml(policy)
    hintless.check(Taxonomy.default())
    assert {
        hintless.rule(type_, level).action
        for type_ in ("privacy", "politics")
        for level in ("low", "medium", "high")
    } == {"allow"}  # type: ignore[union-attr]


def test_a_change_is_named_where_it_is_clear(records: Make) -> None:
    page = ablation.page(
        {
            WHOLE: records(20),
            "without stage II": records(20, risky=6),
            "without hints": records(20),
        }
    )
    assert page.notes[0].startswith("without stage II: handled rightly -7.5 (-")
    assert "risky refused -30.0 (" in page.notes[0] and "type right -7.5" in page.notes[0]
    assert "harmless" not in page.notes[0]
    assert page.notes[1] == "without hints: no share changes clearly."
    assert page.notes[2].startswith("Each of the 14 changes") and "about 1 of" in page.notes[2]
    _, header, rows = page.tables[1]
    row = dict(zip(header, rows[0], strict=True))
    refused = row["risky refused"]
    assert isinstance(refused, Change) and refused.value == pytest.approx(-0.3) and refused.n == 60
    assert len(page.plots) == 6 and page.plots[0][1]["data"][0]["y"][0] == WHOLE


def test_several_seeds_stand_side_by_side(records: Make) -> None:
    """What one seed alone shows is seen to be so."""
    whole = [replace(one, seed=seed) for seed in (0, 1) for one in records(20)]
    less = [*records(20, risky=6), *(replace(one, seed=1) for one in records(20))]
    caption, header, rows = ablation.page({WHOLE: whole, "without hints": less}).tables[2]
    assert "seed by seed" in caption and header == ("method", "seed 0", "seed 1")
    ((name, first, second),) = rows
    assert name == "without hints" and isinstance(first, Change) and isinstance(second, Change)
    assert first.value == pytest.approx(-0.075) and second.value == 0
    captions = [one[0] for one in ablation.page({WHOLE: records(20)}).tables]
    assert not any("seed by seed" in one for one in captions)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = ("concepts.projector=linear", "concepts.tokens=0", "concepts.pooling=none")
    quick = (*bare, "concepts.epochs=1", "tokens.epochs=0")
    arms = {WHOLE: Arm(quick, ("lora.epochs=1",)), "without stage II": Arm(quick, None)}
    monkeypatch.setattr(ablation, "ARMS", arms)
    monkeypatch.setitem(ablation.SCALES, "small", Scale(alignment=8, per_cell=1, seeds=1))
    page = ablation.run(tmp_path, "small", seed=3)
    assert [row[0] for row in page.tables[0][2]] == list(arms)
    (second,) = (tmp_path / "runs").glob("stage2-*")
    config = PsaVlm.from_pretrained(second).bottleneck.config
    assert (config.projector, config.tokens, config.pooling) == ("linear", 0, "none")
