"""Differentiable preprocessing equals the processor's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from psa_vlm.errors import InputError
from psa_vlm.model.pixels import Pixels, pictures_of, rounded, tensor_of


def clip(side: int = 32, **changes: Any) -> Any:
    from transformers import CLIPImageProcessorPil

    size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size, **changes)


def siglip() -> Any:
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 28, "width": 36})


def scene(height: int, width: int) -> Image.Image:
    """Smooth colours with a hard edge, as pictures have."""
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 3, columns * 2 + (columns > width // 2) * 90, (rows + columns) % 256]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (40, 33), (97, 210), (20, 24)])
@pytest.mark.parametrize(
    "processor", [clip(), clip(resample=2), siglip()], ids=["bicubic", "bilinear", "both sides"]
)
def test_pixel_values_equal_the_processor_s(processor: Any, size: tuple[int, int]) -> None:
    picture = scene(*size)
    wanted = processor(images=[picture], return_tensors="pt")["pixel_values"]
    found = Pixels(SimpleNamespace(image_processor=processor))(tensor_of([picture]))
    level = processor.rescale_factor / min(processor.image_std)
    assert found.shape == wanted.shape
    away = (found - wanted).abs() / level  # of 255: halves may be rounded either way
    assert float(away.max()) < 1.01 and float(away.mean()) < 0.1


def test_gradients_reach_every_pixel() -> None:
    pixels = Pixels(SimpleNamespace(image_processor=siglip()))
    x = tensor_of([scene(56, 72)]).requires_grad_()
    pixels(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())


def test_what_cuts_into_crops_is_refused() -> None:
    from transformers import LlavaNextImageProcessorPil

    side = {"height": 32, "width": 32}
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=[[32, 64], [64, 32]]
    )
    with pytest.raises(InputError, match="LlavaNext"):
        Pixels(SimpleNamespace(image_processor=processor))


def test_a_processor_that_is_misread_is_refused() -> None:
    processor = clip()
    other = clip(image_mean=[0.1, 0.1, 0.1])
    processor.to_dict = other.to_dict
    with pytest.raises(InputError):
        Pixels(SimpleNamespace(image_processor=processor))


def test_rounding_is_that_of_8_bits_and_passes_gradients() -> None:
    x = torch.tensor([-3.0, 0.4, 7.6, 300.0], requires_grad=True)
    y = rounded(x)
    assert y.tolist() == [0, 0, 8, 255]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0]


def test_pictures_survive_the_way_there_and_back() -> None:
    picture = scene(9, 7)
    (back,) = pictures_of(tensor_of([picture]))
    assert back.tobytes() == picture.tobytes()
