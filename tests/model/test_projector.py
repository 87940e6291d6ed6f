"""The safety projector."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_vlm.model.projector import SafetyProjector, square_grid

sides = st.integers(1, 6)


@settings(max_examples=25)
@given(h=sides, w=sides, hq=sides, wq=sides)
def test_any_grid_to_any_queries(h: int, w: int, hq: int, wq: int) -> None:
    torch.manual_seed(0)
    projector = SafetyProjector(vision_width=6, hidden=8, text_width=4, depth=1)
    out = projector(torch.randn(2, h * w, 6), (h, w), (hq, wq))
    assert out.shape == (2, hq * wq, 4)
    assert out.isfinite().all()


def test_positions_stand_row_by_row() -> None:
    """Without pooling, a change in one corner reaches its neighbours and not the far corner."""
    torch.manual_seed(0)
    projector = SafetyProjector(vision_width=6, hidden=8, text_width=4, depth=1)
    for stage in (projector.stage1, projector.stage2):  # no gate: it mixes all positions
        torch.nn.init.zeros_(stage[0].se.fc2.weight)
    x = torch.randn(1, 15, 6)
    y = x.clone()
    y[0, 0] += 1.0  # row 0, column 0 of 3 x 5
    moved = (projector(x, (3, 5), (3, 5)) - projector(y, (3, 5), (3, 5))).abs().amax(-1) > 1e-6
    reached = [[True, True, True, False, False]] * 3  # two 3x3 convolutions
    assert moved.view(3, 5).tolist() == reached


def test_depth_and_shortcuts() -> None:
    projector = SafetyProjector(vision_width=6, hidden=8, text_width=4, depth=3, readout_depth=2)
    assert [len(projector.stage1), len(projector.stage2), len(projector.readout)] == [3, 3, 2]
    names = set(projector.state_dict())
    assert {n for n in names if "shortcut" in n} == {
        f"stage1.0.shortcut.{part}" for part in ("conv.weight", "norm.weight", "norm.bias")
    }
    assert not any("conv.bias" in name for name in names)


def test_square_grid() -> None:
    assert square_grid(576) == (24, 24)
    assert square_grid(1) == (1, 1)
    assert square_grid(12) is None
