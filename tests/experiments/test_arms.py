"""What two arms share, and what is never done twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation.scorecard import Record
from psa_vlm.experiments.arms import Arm, Scenes, change, handled, measure
from psa_vlm.testbed.cases import alignment_samples

from .conftest import Make

QUICK = ("concepts.epochs=1", "tokens.epochs=0")


class Drawn:
    """Draws eight scenes, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, seed: int) -> Sequence[Sample]:
        self.times += 1
        return alignment_samples(8, seed)


def test_an_arm_is_trained_and_measured_once(tmp_path: Path) -> None:
    drawn = Drawn()
    scenes = Scenes("eight scenes", drawn)
    whole = measure(tmp_path, Arm(QUICK, ("lora.epochs=1",)), scenes, per_cell=1, seed=0)
    assert measure(tmp_path, Arm(QUICK, ("lora.epochs=1",)), scenes, 1, 0) == whole
    assert drawn.times == 1 and {one.method for one in whole} == {"stage2"}
    first = measure(tmp_path, Arm(QUICK, None), scenes, per_cell=1, seed=0)
    assert {one.method for one in first} == {"stage1"}
    assert [one.question for one in first] == [one.question for one in whole]
    runs = sorted(path.name.partition("-")[0] for path in (tmp_path / "runs").iterdir())
    assert runs == ["stage1", "stage2"]  # both arms share stage I


@pytest.mark.parametrize(
    ("cell", "refused", "correct", "right"),
    [
        ("risky", True, None, True),
        ("risky", False, None, False),
        ("harmless", False, None, True),
        ("lookalike", True, None, False),
        ("vqa", False, True, True),
        ("vqa", False, None, None),
    ],
)
def test_what_a_request_should_get(
    records: Make, cell: str, refused: bool, correct: bool | None, right: bool | None
) -> None:
    one = replace(records(1)[0], cell=cell, refused=refused, correct=correct)  # type: ignore[arg-type]
    assert handled(one) is right


def test_a_change_is_counted_request_by_request(records: Make) -> None:
    found = change(records(20, wrong=5), records(20, wrong=2), handled)
    assert found is not None and found.value == pytest.approx(0.15) and found.n == 240
    assert 0.1 < found.low < 0.15 < found.high < 0.2 and found.clear

    def nothing(one: Record) -> None:
        return None

    same = change(records(20, wrong=5), records(20, wrong=5), handled)
    assert same is not None and (same.low, same.value, same.high) == (0, 0, 0) and not same.clear
    assert change(records(20), records(20), nothing) is None
