"""What is kept on disk: made once, whole, and never taken for that of another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from psa_vlm.evaluation import kept
from psa_vlm.inference import PsaVlm
from psa_vlm.model.probe import is_adapter


@dataclass(frozen=True)
class Row:
    name: str
    share: float | None


def test_rows_and_arrays_are_made_once_and_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [Row("ä", 0.1), Row("b", None)]
    array = np.arange(6.0).reshape(2, 3)
    path, other = tmp_path / "new/rows.jsonl", tmp_path / "new/arrays.safetensors"
    assert kept.rows(path, Row, lambda: rows) == rows
    assert kept.rows(path, Row, lambda: pytest.fail("made again")) == rows
    kept.arrays(other, lambda: {"x": array})
    again = kept.arrays(other, lambda: pytest.fail("made again"))
    assert np.array_equal(again["x"], array)


def test_what_was_stopped_while_it_was_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        kept.rows(tmp_path / "rows.jsonl", Row, _stopped)
    assert list(tmp_path.iterdir()) == []


def _stopped() -> list[Row]:
    raise KeyboardInterrupt


def test_another_adapter_is_another_run(aligned_run: Path) -> None:
    model = PsaVlm.from_pretrained(aligned_run)
    before = kept.key(kept.identity(model))
    assert kept.key(kept.identity(PsaVlm.from_pretrained(aligned_run))) == before
    weights = [w for n, w in model.backbone.model.named_parameters() if is_adapter(n)]
    with torch.no_grad():
        weights[-1] += 1
    assert kept.key(kept.identity(model)) != before
