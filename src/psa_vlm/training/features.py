"""Vision features on disk: each image goes through the frozen vision encoder once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from psa_vlm.data.images import Source, open_images
from psa_vlm.errors import CheckpointError, ImageError
from psa_vlm.model.backbone import Backbone
from psa_vlm.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image


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
    behind the last of them. Files of another backbone are in another folder, and never read.

    Args:
        folder: where the files are.
        backbone: encodes the images.
    """

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.folder = folder / backbone_key(backbone)[:16]
        self.backbone = backbone
        self._files: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __getitem__(self, key: str) -> Tensor:
        """Features ``[frames, H, W, Dv]`` of the image with this key, on the CPU."""
        features: Tensor = self._files[key].get_tensor(key)
        return features

    def frames(self, key: str) -> int:
        """Pictures in the image: 1, or more in an animation."""
        count: int = self._files[key].get_slice(key).get_shape()[0]
        return count

    def add(self, images: Iterable[tuple[str, Source]], batch: int) -> None:
        """Encode the images that are not there yet, each content once.

        Args:
            images: key and image.
            batch: images in one pass.

        Raises:
            ImageError: an image can't be used.
            CheckpointError: the features can't be written.
        """
        missing = [(key, image) for key, image in dict(images).items() if key not in self]
        batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
        self.folder.mkdir(parents=True, exist_ok=True)
        for one in track(batches, "vision features"):
            self._encode(one)

    def _encode(self, images: list[tuple[str, Source]]) -> None:
        opened = [(key, open_images(image)) for key, image in images]
        features = self.backbone.encode([frame for _, frames in opened for frame in frames])
        maps = iter(features.maps)
        tensors = {  # the pictures of one animation are of one size
            key: torch.stack(list(islice(maps, len(frames)))).cpu() for key, frames in opened
        }
        path = self.folder / f"{len(list(self.folder.glob('*.safetensors'))):06d}.safetensors"
        writing = path.with_suffix(".writing")
        try:
            save_file(tensors, writing)
            os.replace(writing, path)
        except (OSError, SafetensorError) as error:
            writing.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: can't be written ({error}); the features before it are kept: free some"
                " space and run the same command again"
            ) from error
        self._open(path)

    def _open(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        self._files.update(dict.fromkeys(file.keys(), file))
