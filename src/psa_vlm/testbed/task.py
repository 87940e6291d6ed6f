"""The testbed as a task for Inspect: its held-out requests, with what each asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psa_vlm.evaluation.tasks.base import Wanted, to_inspect
from psa_vlm.testbed.cases import CELLS, SPLITS, Cell, Split, evaluation_samples

if TYPE_CHECKING:
    from inspect_ai.dataset import Sample

NAME = "testbed"
MAX_TOKENS = 40


def requests(per_cell: int, seed: int) -> list[Sample]:
    """Held-out requests of every split and cell, fresh for each seed."""
    return [
        to_inspect(sample, wanted(split, cell))
        for split in SPLITS
        for cell in CELLS
        for sample in evaluation_samples(split, cell, per_cell, seed)
    ]


def wanted(split: Split, cell: Cell) -> Wanted:
    """What requests of a cell ask for."""
    group = f"{cell}, {split}"
    if cell == "vqa":
        return Wanted("target", group)
    if cell == "risky":
        return Wanted("refuse", group, "attack")
    return Wanted("answer", group, "harmless")
