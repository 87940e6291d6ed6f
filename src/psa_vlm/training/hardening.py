"""Noise and attacks in training: what a bottleneck, or a vision encoder, is to withstand later.

Adversarial training is that of Madry et al. 2018 (arXiv:1706.06083), few steps from a random start
(Wong et al. 2020, arXiv:2001.03994), through the vision encoder. Shape letters: B images, H x W the
grid of their features, Dv vision width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psa_vlm.model.backbone import Backbone
from psa_vlm.model.pixels import Pixels, tensor_of
from psa_vlm.training.config import Hardening

if TYPE_CHECKING:
    from PIL.Image import Image

Loss = Callable[[list[Tensor], list[int]], Tensor]
"""Features ``[H, W, Dv]`` of some of the B images, and which they are, to a scalar."""

REACH = 2.5
"""All steps together go so many times as far as an attack may."""


def noisy(maps: Sequence[Tensor], share: float) -> list[Tensor]:
    """Features with Gaussian noise of `share` times each image's own standard deviation."""
    return [one + share * one.std() * torch.randn_like(one) for one in maps]


class Hardener:
    """Changes pictures for the worse, within bounds, and encodes them.

    Args:
        backbone: its vision encoder is attacked.
        config: how far.

    Raises:
        InputError: gradients can't pass through the processor.
    """

    def __init__(self, backbone: Backbone, config: Hardening) -> None:
        self.backbone = backbone
        self.config = config
        self.pixels = Pixels(backbone.processor)

    def __call__(self, pictures: Sequence[Image], loss: Loss) -> list[Tensor]:
        """Features of B changed pictures, through which gradients reach only the encoder's weights.

        Args:
            pictures: RGB.
            loss: what the changes raise.
        """
        sizes: dict[tuple[int, int], list[int]] = {}
        for row, picture in enumerate(pictures):
            sizes.setdefault(picture.size, []).append(row)
        maps: dict[int, Tensor] = {}
        for rows in sizes.values():
            changed = self._changed([pictures[row] for row in rows], rows, loss)
            maps.update(zip(rows, changed, strict=True))
        return [maps[row] for row in range(len(pictures))]

    def _changed(self, pictures: list[Image], rows: list[int], loss: Loss) -> tuple[Tensor, ...]:
        config, device = self.config, self.backbone.device
        inputs, marks = self.backbone.process(pictures)

        def encode(x: Tensor) -> tuple[Tensor, ...]:
            values = self.pixels(x).to(self.backbone.dtype)
            return self.backbone.encode_inputs({**inputs, "pixel_values": values}, marks).maps

        clean = tensor_of(pictures).to(device)  # [B, 3, rows, columns] in 0 to 255
        clean = clean + config.pixel_noise * torch.randn_like(clean)
        x = clean
        if config.eps:
            x = clean + config.eps * (2 * torch.rand_like(clean) - 1)
            for _ in range(config.steps):
                x = x.detach().requires_grad_()
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(loss(list(encode(x)), rows), x)
                x = x + REACH * config.eps / max(config.steps, 2) * gradient.sign()
                x = x.clamp(clean - config.eps, clean + config.eps)
        return encode(x.detach())
