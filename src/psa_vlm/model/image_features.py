"""Encoded images: all that the bottleneck and the language model need of them.

Shape letters: B images, N image positions, Dv vision width, H x W grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """B encoded images."""

    maps: tuple[Tensor, ...]
    """h_o, vision features before the projector: ``[H, W, Dv]`` of each image."""
    projected: Any
    """What ``get_image_features`` returned, image by image; its ``pooler_output`` is h_i or, where
    h_i waits for the question, what the vision encoder gave."""
    marks: tuple[str, ...]
    """What stands for each image in the text of a prompt."""
    positions: tuple[int, ...]
    """How many of a prompt's positions each image fills."""
    prompt_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the language model wants to know of the images, a row for each."""
    joined: bool = False
    """Whether the language model wants h_i as one tensor rather than one for each image."""

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the N positions of h_o, where all images have the same."""
        (grid,) = {(features.shape[0], features.shape[1]) for features in self.maps}
        return grid

    @property
    def h_o(self) -> Tensor:
        """h_o ``[B, N, Dv]``, row by row, where all images have the same grid."""
        return torch.stack(self.maps).flatten(1, 2)

    def take(self, indices: Sequence[int]) -> ImageFeatures:
        """The features of some of the images, in the order of ``indices``."""
        picked = dict(self.projected)
        h_i = picked.pop("pooler_output")
        picked = {
            name: [[one[i] for i in indices] for one in all_] for name, all_ in picked.items()
        }
        picked["pooler_output"] = [h_i[i] for i in indices]
        return ImageFeatures(
            tuple(self.maps[i] for i in indices),
            type(self.projected)(**picked),
            tuple(self.marks[i] for i in indices),
            tuple(self.positions[i] for i in indices),
            {name: rows[list(indices)] for name, rows in self.prompt_inputs.items()},
            self.joined,
        )

    def mm_encoder_outputs(self) -> dict[str, Any]:
        """The argument of that name for the model; a copy, because generation may change it."""
        copy = type(self.projected)(**self.projected)
        if self.joined:
            copy["pooler_output"] = torch.cat(copy.pooler_output)
        return {"image": copy}

    def model_inputs(self) -> dict[str, Any]:
        """All that the model is called with in place of the pixels."""
        return {"mm_encoder_outputs": self.mm_encoder_outputs(), **self.prompt_inputs}
