"""An image processor as differentiable arithmetic: resize, crop, rescale, normalise.

What an attack changes are the 8-bit pixels that a user sends, so its gradients have to pass through
all that is done to them. Shape letters: B images, H x W their size, S x T what the model sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from psa_vlm.errors import InputError

MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of resampling filters, and their names in torch."""
TOLERANCE = 2.0
"""How far a checked pixel may be from the processor's own, of 255: libraries round differently."""
PROBE = (61, 83)
"""Rows and columns of the picture on which equality is checked."""


class Pixels:
    """8-bit pixels to the pixel values of one processor, with gradients.

    Rounding passes gradients as they are, so that what is computed is exactly what the rounded
    image gives.

    Args:
        processor: of the vision-language model; the facts are read off its configuration, and the
            outcome is compared with its own on a random picture.

    Raises:
        InputError: it does something else than resize, crop and normalise (cuts into crops, say).
    """

    def __init__(self, processor: Any) -> None:
        image = processor.image_processor
        self.facts: dict[str, Any] = image.to_dict()
        self._check(processor)

    def __call__(self, images: Tensor) -> Tensor:
        """Pixel values ``[B, 3, S, T]`` of images ``[B, 3, H, W]`` in 0 to 255, all of one size."""
        facts = self.facts
        x = rounded(images)  # [B, 3, H, W]
        if facts.get("do_resize") and (size := self._size(*x.shape[-2:])) != tuple(x.shape[-2:]):
            mode = MODES[int(facts["resample"])]
            smooth = {} if mode == "nearest-exact" else {"antialias": True}
            for step in ((x.shape[-2], size[1]), size):  # columns first, and 8 bits in between
                x = rounded(F.interpolate(x, step, mode=mode, **smooth))
        if facts.get("do_center_crop"):
            crop = facts["crop_size"]
            top, left = ((x.shape[-2] - crop["height"]) // 2, (x.shape[-1] - crop["width"]) // 2)
            x = x[..., top : top + crop["height"], left : left + crop["width"]]
        if facts.get("do_rescale"):
            x = x * facts["rescale_factor"]
        if facts.get("do_normalize"):
            mean, std = (x.new_tensor(facts[name])[:, None, None] for name in _MOMENTS)
            x = (x - mean) / std
        return x

    def _size(self, height: int, width: int) -> tuple[int, int]:
        size = self.facts["size"]
        if "height" in size:
            return size["height"], size["width"]
        short, edge = min(height, width), size["shortest_edge"]
        return tuple(edge if n == short else int(edge * n / short) for n in (height, width))  # type: ignore[return-value]

    def _check(self, processor: Any) -> None:
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (*PROBE, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        wanted = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        try:
            found = self(tensor_of([picture]))
            unit = self.facts.get("rescale_factor", 1.0) / min(self.facts.get("image_std") or [1.0])
            fits = found.shape == wanted.shape and bool(
                ((found - wanted).abs().max() <= TOLERANCE * unit).item()
            )
        except (KeyError, TypeError, RuntimeError):
            fits = False
        if not fits:
            raise InputError(
                f"gradients can't pass through a {type(processor.image_processor).__name__}: it"
                " does more than resize, crop and normalise; leave the gradient attacks out"
            )


_MOMENTS = ("image_mean", "image_std")


def rounded(x: Tensor) -> Tensor:
    """The nearest whole numbers within 0 and 255; the gradient is that of the clamped values."""
    x = x.clamp(0, 255)
    return x + (x.round() - x).detach()


def tensor_of(pictures: Any) -> Tensor:
    """RGB pictures of one size as ``[B, 3, H, W]`` in 0 to 255."""
    arrays = [np.asarray(picture, dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def pictures_of(x: Tensor) -> list[Any]:
    """The 8-bit RGB pictures of ``[B, 3, H, W]`` in 0 to 255."""
    from PIL import Image

    arrays = x.detach().clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]
