"""Records of made-up requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from psa_vlm.evaluation.scorecard import SPLITS, Record
from psa_vlm.testbed.cases import CELLS

Make = Callable[..., list[Record]]


@pytest.fixture(scope="session")
def records() -> Make:
    """Makes records of `per_cell` requests of each split and cell, of which the first `wrong` are
    handled wrongly; a keyword for a cell, as in `risky=3`, is the number wrong there."""

    def make(per_cell: int = 20, wrong: int = 0, **by_cell: int) -> list[Record]:
        found = []
        for split in SPLITS:
            for cell in CELLS:
                for i in range(per_cell):
                    right = i >= by_cell.get(cell, wrong)
                    labels: dict[str, Any] = dict.fromkeys(("true_type", "pred_type"), "privacy")
                    labels |= dict.fromkeys(("true_level", "pred_level"), "high")
                    if not right:
                        labels["pred_type"] = "politics"
                    record = Record(
                        method="stage2",
                        split=split,
                        cell=cell,
                        question="What is this?",
                        expected="It is one.",
                        reply="",
                        refused=right if cell == "risky" else not right and cell != "vqa",
                        correct=right if cell == "vqa" else None,
                        **labels,
                    )
                    found.append(record)
        return found

    return make
