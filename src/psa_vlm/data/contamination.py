"""Does an evaluation set share images or prompts with what a model was trained on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psa_vlm.data.hashes import NEAR, Hashes, array, fingerprinter, near_any, prompt_hash
from psa_vlm.data.sample import Sample
from psa_vlm.errors import CheckpointError

FILE = "seen.safetensors"
"""In a run folder: hashes of all that it was trained on, stage I included."""

_NAMES = ("pixels", "looks", "prompts")


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of images and prompts, in no order; a megabyte holds some 40,000 samples.

    Attributes:
        pixels: what images hold, ``[n]``.
        looks: what images look like, ``[n]``.
        prompts: what users say, ``[m]``.
    """

    pixels: Hashes
    looks: Hashes
    prompts: Hashes

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Fingerprints:
        """Look at every image and prompt.

        Raises:
            ImageError: an image can't be used.
            MissingExtra: imagehash is not installed.
        """
        look_at = fingerprinter()
        prints = {look_at(image) for sample in samples for image in sample.images}
        return cls(
            array(sorted({one.pixels for one in prints})),
            array(sorted({one.look for one in prints})),
            array(sorted({prompt_hash(sample) for sample in samples})),
        )

    def __or__(self, other: Fingerprints) -> Fingerprints:
        """What either has seen."""
        return Fingerprints(
            *(np.union1d(getattr(self, one), getattr(other, one)) for one in _NAMES)
        )

    def save(self, folder: Path) -> None:
        """Write it into a run folder."""
        from safetensors.numpy import save_file

        save_file({name: getattr(self, name) for name in _NAMES}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Fingerprints | None:
        """Read it from a run folder; None if the run holds none.

        Raises:
            CheckpointError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); train the run anew") from None


@dataclass(frozen=True)
class Contamination:
    """How many evaluation samples share something with training.

    Attributes:
        samples: evaluated.
        images: of them, with an image whose pixels were trained on.
        near_images: with an image that looks nearly like one, those above not included.
        prompts: whose prompt was trained on, beside whatever image.
        both: with such an image, the same or nearly, and such a prompt.
        ids: of samples with an image that was trained on, the same or nearly.
    """

    samples: int
    images: int
    near_images: int
    prompts: int
    both: int
    ids: tuple[str, ...]

    def __str__(self) -> str:
        if not self.images + self.near_images + self.prompts:
            return f"contamination: none of {self.samples} samples is known from training"
        return (
            f"contamination: of {self.samples} samples, {self.images} share an image with training,"
            f" {self.near_images} nearly, {self.prompts} a prompt, {self.both} both"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def contamination(samples: Sequence[Sample], seen: Fingerprints, near: int = NEAR) -> Contamination:
    """Compare evaluation samples with what was trained on.

    Args:
        samples: what is evaluated.
        seen: what was trained on.
        near: bits of 64 in which the looks of nearly equal images may differ.

    Raises:
        ImageError: an image can't be used.
        MissingExtra: imagehash is not installed.
    """
    pixels, prompts = set(seen.pixels.tolist()), set(seen.prompts.tolist())
    look_at = fingerprinter()
    exact = nearly = said = both = 0
    ids = []
    for sample in samples:
        prints = [look_at(image) for image in sample.images]
        same = any(one.pixels in pixels for one in prints)
        alike = same or near_any([one.look for one in prints], seen.looks, near)
        prompt = prompt_hash(sample) in prompts
        exact, nearly = exact + same, nearly + (alike and not same)
        said, both = said + prompt, both + (alike and prompt)
        if alike:
            ids.append(sample.id)
    return Contamination(len(samples), exact, nearly, said, both, tuple(ids))
