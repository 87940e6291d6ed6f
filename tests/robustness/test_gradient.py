"""Attacks on pixels stay within bounds, find what is there, and leave alone what has fallen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psa_vlm.robustness.gradient import Bounds, Objective, apgd, square

CLEAN = torch.full((2, 3, 8, 8), 100.0)
PATTERN = torch.randn((3, 8, 8), generator=torch.Generator().manual_seed(0))


def linear(x: Tensor, rows: list[int]) -> tuple[Tensor, list[bool]]:
    """Lowest in the corner of the ball that the pattern's signs point away from."""
    return ((x - 100) * PATTERN).flatten(1).sum(1), [False] * len(rows)


LEAST = -8 * float(PATTERN.abs().sum())
"""Of `linear` within eps 8."""


def falling_below(limit: float, calls: list[list[int]]) -> Objective:
    def objective(x: Tensor, rows: list[int]) -> tuple[Tensor, list[bool]]:
        calls.append(rows)
        loss, _ = linear(x, rows)
        return loss, [bool(one < limit) and row == 0 for one, row in zip(loss, rows, strict=True)]

    return objective


def test_apgd_finds_the_corner_of_the_ball() -> None:
    found = apgd(linear, CLEAN, Bounds.ball(CLEAN, 8), 20)
    assert found.loss == pytest.approx(torch.full((2,), LEAST))
    assert torch.equal(found.images[0], (100 - 8 * PATTERN.sign()))
    assert not found.fallen.any() and not found.dead.any()


def test_apgd_settles_where_the_best_is_inside() -> None:
    """With a fixed step it would jump to and fro around the target."""

    def bowl(x: Tensor, rows: list[int]) -> tuple[Tensor, list[bool]]:
        return ((x - 103.2) ** 2).flatten(1).mean(1), [False] * len(rows)

    found = apgd(bowl, CLEAN, Bounds.ball(CLEAN, 16), 60)
    assert float(found.loss.max()) < 0.05


def test_what_has_fallen_is_left_alone() -> None:
    calls: list[list[int]] = []
    found = apgd(falling_below(LEAST / 2, calls), CLEAN, Bounds.ball(CLEAN, 8), 5, restarts=2)
    assert found.fallen.tolist() == [True, False]
    assert calls[0] == [0, 1] and calls[-1] == [1]
    assert len(calls) == 2 * (5 + 1)


def test_a_zero_gradient_is_noted() -> None:
    def flat(x: Tensor, rows: list[int]) -> tuple[Tensor, list[bool]]:
        return (x * 0).flatten(1).sum(1), [False] * len(rows)

    assert apgd(flat, CLEAN, Bounds.ball(CLEAN, 8), 2).dead.all()


@pytest.mark.parametrize("value", [0.0, 3.0, 255.0])
def test_images_stay_in_the_ball_and_in_8_bits(value: float) -> None:
    clean = torch.full((1, 3, 8, 8), value)
    bounds = Bounds.ball(clean, 8)
    for found in (apgd(linear, clean, bounds, 6, 3), square(linear, clean, 8, 20)):
        assert float((found.images - clean).abs().max()) <= 8
        assert float(found.images.min()) >= 0 and float(found.images.max()) <= 255
        assert torch.equal(found.images, found.images.round())


def test_a_patch_changes_nothing_beside_it() -> None:
    bounds = Bounds.patch(CLEAN, 3, seed=1)
    found = apgd(linear, CLEAN, bounds, 10)
    changed = (found.images != CLEAN).any(1)  # [B, H, W]
    assert changed.sum((1, 2)).tolist() == [9, 9]
    rows = changed[0].any(1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) == 2


def test_square_lowers_the_loss_without_gradients() -> None:
    few, many = (square(linear, CLEAN, 8, queries).loss for queries in (5, 200))
    assert (many < few).all() and float(many.max()) < 0.5 * LEAST


def test_apgd_is_no_weaker_than_an_independent_pgd() -> None:
    foolbox = pytest.importorskip("foolbox")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)
        ).eval()
        clean = torch.randint(60, 200, (16, 3, 8, 8)).float()
    labels = net(clean / 255).argmax(1)

    def objective(x: Tensor, rows: list[int]) -> tuple[Tensor, list[bool]]:
        logits = net(x.round() / 255 + (x - x.detach()) / 255)
        right = labels[rows][:, None]
        margin = (logits.gather(1, right) - logits.gather(1, 1 - right)).squeeze(1)
        return margin, (margin < 0).tolist()

    found = apgd(objective, clean, Bounds.ball(clean, 3), 40)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    _, _, theirs = foolbox.attacks.LinfPGD(steps=40)(model, clean / 255, labels, epsilons=3 / 255)
    assert 0 < int(theirs.sum()) <= int(found.fallen.sum())
