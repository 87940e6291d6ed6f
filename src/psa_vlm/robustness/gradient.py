"""Attacks on pixels within bounds: APGD with gradients, Square without.

Shape letters: B images, H x W their size. Both minimise a loss; an image that has fallen is left
alone, so that easy ones cost few steps. Sources: APGD, Croce and Hein 2020 (arXiv:2003.01690);
Square, Andriushchenko et al. 2020 (arXiv:1912.00049).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTUM = 0.75
PROGRESS = 0.75
"""A step size stays while this share of the steps since the last checkpoint lowered the loss."""
FIRST_CHECKPOINT, CHECKPOINT_SHRINKS, LEAST_CHECKPOINT = 0.22, 0.03, 0.06
"""When progress is looked at, in shares of all steps."""
SQUARE_SHARE = 0.8
"""Share of the image that Square's first squares cover."""

Objective = Callable[[Tensor, list[int]], tuple[Tensor, list[bool]]]
"""Images ``[b, 3, H, W]`` and which of the B they are, to their losses ``[b]`` and whether each has
fallen. What it says of an image must hold for the image rounded to 8 bits."""


@dataclass
class Found:
    """What an attack found.

    Attributes:
        images: the best of each ``[B, 3, H, W]``, whole numbers from 0 to 255.
        loss: of them ``[B]``.
        fallen: ``[B]`` bool.
        dead: ``[B]`` bool, whether the first gradient was zero everywhere.
    """

    images: Tensor
    loss: Tensor
    fallen: Tensor
    dead: Tensor

    @classmethod
    def start(cls, clean: Tensor) -> Found:
        """Nothing found yet."""
        nothing = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        loss = torch.full((len(clean),), math.inf, device=clean.device)
        return cls(clean.round(), loss, nothing, nothing.clone())

    def left(self) -> list[int]:
        """The images that have not fallen."""
        rows: list[int] = (~self.fallen).nonzero().flatten().tolist()
        return rows

    def take(self, rows: list[int], images: Tensor, loss: Tensor, fallen: list[bool]) -> Tensor:
        """Keep what is better than before, a fall above all.

        Returns:
            Whether each of `rows` was ``[b]``.
        """
        fell = torch.tensor(fallen, device=loss.device)
        better = fell | (loss < self.loss[rows])
        chosen = [row for row, good in zip(rows, better.tolist(), strict=True) if good]
        self.images[chosen] = images[better].clamp(0, 255).round()
        self.loss[chosen] = loss[better]
        self.fallen[chosen] |= fell[better]
        return better


@dataclass(frozen=True)
class Bounds:
    """What an attack may make of each pixel, as ``[B, 3, H, W]``."""

    low: Tensor
    high: Tensor

    @classmethod
    def ball(cls, clean: Tensor, eps: float) -> Bounds:
        """Every value may move by `eps` (of 255)."""
        return cls((clean - eps).clamp(min=0), (clean + eps).clamp(max=255))

    @classmethod
    def patch(cls, clean: Tensor, side: int, seed: int) -> Bounds:
        """A square of `side` pixels may be anything, at a place drawn for each image."""
        low, high = clean.clone(), clean.clone()
        draw = torch.Generator().manual_seed(seed)
        for row in range(len(clean)):
            top, left = (
                int(torch.randint(0, extent - side + 1, (), generator=draw))
                for extent in clean.shape[-2:]
            )
            low[row, :, top : top + side, left : left + side] = 0
            high[row, :, top : top + side, left : left + side] = 255
        return cls(low, high)

    def into(self, x: Tensor, rows: list[int]) -> Tensor:
        """The nearest allowed images."""
        return x.clamp(self.low[rows], self.high[rows])

    def draw(self, rows: list[int], generator: torch.Generator) -> Tensor:
        """Random allowed images."""
        low, high = self.low[rows], self.high[rows]
        noise = torch.rand(low.shape, generator=generator).to(low)
        return low + (high - low) * noise


def apgd(
    objective: Objective,
    clean: Tensor,
    bounds: Bounds,
    steps: int,
    restarts: int = 1,
    seed: int = 0,
) -> Found:
    """Minimise by sign gradients with momentum and a step size that halves when progress stops.

    The first restart starts at the clean image, the others at random allowed ones.
    """
    found = Found.start(clean)
    draw = torch.Generator().manual_seed(seed)
    for restart in range(restarts):
        if not (rows := found.left()):
            break
        start = bounds.draw(rows, draw) if restart else bounds.into(clean[rows], rows)
        _descend(objective, found, bounds, start, rows, steps)
    return found


def _descend(
    objective: Objective, found: Found, bounds: Bounds, start: Tensor, rows: list[int], steps: int
) -> None:
    """One restart of APGD for some of the images; what is found goes into `found`."""
    span = bounds.high - bounds.low  # [B, 3, H, W]: twice eps inside the range of pixels
    step = torch.ones(len(found.images), device=start.device)  # [B], in shares of `span`
    x = found.images.clone()
    x[rows] = start
    before, best, best_gradient = x.clone(), x.clone(), torch.zeros_like(x)
    best_loss = torch.full_like(found.loss, math.inf)
    last_loss = torch.full_like(found.loss, math.inf)
    progress = torch.zeros_like(step)  # steps since the checkpoint that lowered the loss
    halved = torch.zeros_like(step, dtype=torch.bool)
    best_at_checkpoint = best_loss.clone()
    length = max(1, math.ceil(FIRST_CHECKPOINT * steps))
    checkpoint = length
    for index in range(steps + 1):
        at = x[rows].clone().requires_grad_()
        loss, fallen = objective(at, rows)  # [b]
        (gradient,) = torch.autograd.grad(loss.sum(), at)
        loss = loss.detach()
        if index == 0:
            found.dead[rows] |= gradient.abs().amax((1, 2, 3)) == 0
        found.take(rows, at.detach(), loss, fallen)
        progress[rows] += (loss < last_loss[rows]).float()
        last_loss[rows] = loss
        better = loss < best_loss[rows]
        improved = [row for row, good in zip(rows, better.tolist(), strict=True) if good]
        best_loss[improved], best[improved] = loss[better], at.detach()[better]
        best_gradient[improved] = gradient[better]
        now = dict(zip(rows, gradient, strict=True))
        rows = [row for row, fell in zip(rows, fallen, strict=True) if not fell]
        if not rows or index == steps:
            return
        direction = torch.stack([now[row] for row in rows])
        if index == checkpoint:
            stuck = progress < PROGRESS * length
            idle = ~halved & (best_at_checkpoint <= best_loss)
            halved = stuck | idle
            again = [row for row in rows if bool(halved[row])]
            step[again] /= 2
            x[again], before[again] = best[again], best[again]
            direction = torch.stack(
                [best_gradient[row] if bool(halved[row]) else now[row] for row in rows]
            )
            best_at_checkpoint = best_loss.clone()
            progress.zero_()
            length = max(
                math.ceil(LEAST_CHECKPOINT * steps),
                length - math.ceil(CHECKPOINT_SHRINKS * steps),
            )
            checkpoint = index + max(length, 1)
        here = x[rows]
        moved = step[rows][:, None, None, None] * span[rows]
        z = bounds.into(here - moved * direction.sign(), rows)
        a = MOMENTUM if index else 1.0
        x[rows] = bounds.into(here + a * (z - here) + (1 - a) * (here - before[rows]), rows)
        before[rows] = here


@torch.no_grad()
def square(objective: Objective, clean: Tensor, eps: float, queries: int, seed: int = 0) -> Found:
    """Minimise without gradients: random squares of the largest allowed change, kept if better.

    Args:
        objective: asked once a query; an attacker from outside can do the same.
        clean: ``[B, 3, H, W]``.
        eps: most change of a value, of 255.
        queries: of each image.
        seed: of the squares.
    """
    found, bounds = Found.start(clean), Bounds.ball(clean, eps)
    draw = torch.Generator().manual_seed(seed)
    height, width = clean.shape[-2:]
    rows = found.left()
    stripes = _signs((len(rows), 3, 1, width), draw).to(clean)
    x = bounds.into(clean + eps * stripes, rows)
    for query in range(queries):
        loss, fallen = objective(x, rows)
        found.take(rows, x, loss, fallen)
        rows = found.left()
        if not rows:
            break
        x = found.images[rows].clone()
        side = round(math.sqrt(_share(query / queries) * height * width))
        side = min(max(side, 1), height, width)
        for row in range(len(rows)):
            top = int(torch.randint(0, height - side + 1, (), generator=draw))
            left = int(torch.randint(0, width - side + 1, (), generator=draw))
            window = (slice(top, top + side), slice(left, left + side))
            change = eps * _signs((3, 1, 1), draw).to(clean)
            x[(row, slice(None), *window)] = clean[(rows[row], slice(None), *window)] + change
        x = bounds.into(x, rows)
    return found


def _signs(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=draw).float() * 2 - 1


def _share(done: float) -> float:
    """Share of the image that the next square covers, as its authors halve it."""
    halvings = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    return SQUARE_SHARE / 2.0 ** sum(done > at for at in halvings)
