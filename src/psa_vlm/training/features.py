"""Vision features on disk: each image goes through the frozen vision encoder once, if it fits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psa_vlm.data.images import Source, open_images
from psa_vlm.errors import CheckpointError, ImageError
from psa_vlm.model.backbone import Backbone
from psa_vlm.progress import track
from psa_vlm.training.processes import is_main

if TYPE_CHECKING:
    from PIL.Image import Image

_logger = logging.getLogger(__name__)


def image_key(image: Path | Image) -> str:
    """Hex digits of an image's content: a file's bytes, or a picture's pixels.

    Raises:
        ImageError: it can't be read.
    """
    if isinstance(image, Path):
        try:
            with image.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ImageError(f"{image}: cannot be read ({error.strerror})") from None
    digest = hashlib.sha256()
    for frame in open_images(image):
        digest.update(f"{frame.size}".encode() + frame.tobytes())
    return digest.hexdigest()


def backbone_key(backbone: Backbone) -> str:
    """Hex digits that change with a backbone's configuration, its processor, or its weights.

    Of each weight the first numbers are read, so that large models take no time.
    """
    digest = hashlib.sha256(backbone.model.config.to_json_string().encode())
    digest.update(json.dumps(backbone.processor.image_processor.to_dict(), default=str).encode())
    for name, weight in backbone.model.named_parameters():
        numbers = weight.detach().flatten()[:16].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + numbers.tobytes())
    return digest.hexdigest()


class FeatureCache:
    """h_o by image content, in safetensors files that are read as they are needed.

    Each file holds one batch and appears in one piece, so that a run that was killed goes on
    behind the last of them; a damaged one is deleted and made again. Files of another backbone are
    in another folder, and never read. What does not fit into the budget is encoded whenever it is
    asked for.

    Args:
        folder: where the files are.
        backbone: encodes the images.
        budget: bytes that the files may take.
    """

    def __init__(self, folder: Path, backbone: Backbone, budget: float = float("inf")) -> None:
        self.folder = folder / backbone_key(backbone)[:16]
        self.backbone = backbone
        self.budget = budget
        self._files: dict[str, Any] = {}
        self._past: dict[str, Source] = {}
        for path in self._paths():
            try:
                self._open(path)
            except (OSError, SafetensorError):
                _logger.warning("%s: damaged; its images are encoded again", path)
                path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._files

    @property
    def complete(self) -> bool:
        """Whether all that was added is on disk."""
        return not self._past

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Features ``[frames, H, W, Dv]`` of the images with these keys, on the CPU."""
        wanted = list(dict.fromkeys(keys))
        past = [(key, self._past[key]) for key in wanted if key not in self]
        found = self._encoded(past) if past else {}
        return found | {key: self._files[key].get_tensor(key) for key in wanted if key in self}

    def frames(self, key: str) -> int:
        """Pictures in the image: 1, or more in an animation."""
        if key not in self:
            return len(open_images(self._past[key]))
        count: int = self._files[key].get_slice(key).get_shape()[0]
        return count

    def add(self, images: Iterable[tuple[str, Source]], batch: int) -> None:
        """Encode the images that are not there yet, each content once, as far as the budget goes.

        How much they all will take is printed when the first batch shows it.

        Args:
            images: key and image.
            batch: images in one pass.

        Raises:
            ImageError: an image can't be used.
            CheckpointError: the features can't be written.
        """
        missing = [(key, image) for key, image in dict(images).items() if key not in self]
        batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        used = sum(path.stat().st_size for path in self._paths())
        for index, some in enumerate(track(batches, "vision features")):
            tensors = self._encoded(some)
            size = sum(one.nbytes for one in tensors.values())
            if index == 0 and is_main():
                self._estimate(used + size / len(some) * len(missing), len(missing))
            if used + size > self.budget:
                self._past = dict(missing[index * batch :])
                return
            used += size
            self._write(tensors)

    def _estimate(self, size: float, images: int) -> None:
        """Say on stderr what the features of all images will take."""
        told = f"vision features of {images:,} images: about {size / 1e9:.3g} GB on disk"
        if size > self.budget:
            share = max(self.budget / size, 0.0)
            told += (
                f", of which {share:.0%} fits the budget of {self.budget / 1e9:.3g} GB; the rest is"
                " encoded in every epoch (concepts.cache_gb)"
            )
        Console(stderr=True).print(told, soft_wrap=True)

    def _encoded(self, images: list[tuple[str, Source]]) -> dict[str, Tensor]:
        """Features of some images in one pass, by key."""
        opened = [(key, open_images(image)) for key, image in images]
        features = self.backbone.encode([frame for _, frames in opened for frame in frames])
        maps = iter(features.maps)
        return {  # the pictures of one animation are of one size
            key: torch.stack(list(islice(maps, len(frames)))).cpu() for key, frames in opened
        }

    def _write(self, tensors: dict[str, Tensor]) -> None:
        paths = self._paths()
        path = self.folder / f"{int(paths[-1].stem) + 1 if paths else 0:06d}.safetensors"
        writing = path.with_suffix(".writing")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, writing)
            os.replace(writing, path)
        except (OSError, SafetensorError) as error:
            writing.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: can't be written ({error}); the features before it are kept: free some"
                " space and run the same command again"
            ) from error
        self._open(path)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _open(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._files.update(dict.fromkeys(file.keys(), file))
