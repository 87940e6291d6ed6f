"""Before stage I, if asked for: a vision encoder that changed pixels move less.

Unsupervised adversarial fine-tuning as Schlarmann et al. 2024 do it to CLIP (FARE,
arXiv:2402.12336): an image under attack is to keep the features that the original encoder gave the
image as it is. No label is needed, and what reads the features still understands them. Here the
features are h_o, and the image as it is counts as much as the attacked one.

Shape letters: B images, H x W the grid of their features, Dv vision width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.checkpoint import atomic_folder
from psa_vlm.model.pixels import Pixels
from psa_vlm.sharing.provenance import HISTORY, RECORD
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.config import EncoderConfig, EncoderSchedule, Hardening
from psa_vlm.training.features import image_key
from psa_vlm.training.fit import History, Rows, Task, Work, fit
from psa_vlm.training.hardening import Hardener
from psa_vlm.training.processes import is_main, main_first
from psa_vlm.training.runs import Run, loading, read_samples, write_json

if TYPE_CHECKING:
    from PIL.Image import Image


def run_encoder(config: EncoderConfig, samples: Sequence[Sample] | None = None) -> Backbone:
    """Write the base model with a hardened vision encoder to `config.out`, or go on with it.

    The folder is a checkpoint like the one it was made from; stage I starts from it.

    Args:
        config: what to do.
        samples: with images; None reads `config.data`.

    Raises:
        ConfigError: a path of the configuration is wrong, or `out` holds something else.
        DataError: samples can't be used.
        ImageError: an image can't be used.
        InputError: gradients can't pass through the processor.
        NoLanguageModel: the backbone is a dual encoder.
        CheckpointError: the backbone can't be read, or a checkpoint can't be written.
    """
    samples = read_samples(config, Taxonomy.default()) if samples is None else samples
    how = loading(config)
    backbone = Backbone.from_pretrained(config.backbone, **how)
    check_hardenable(backbone, samples)  # before a work folder is begun
    run = Run(0, config, samples, [backbone.model])
    if run.finished:
        run.clean()
        return Backbone.from_pretrained(run.out, **how)
    history = train_encoder(backbone, samples, config.encoder, run.work("encoder"))
    with main_first():
        if is_main():
            with atomic_folder(run.out) as folder:
                backbone.model.save_pretrained(folder)
                backbone.processor.save_pretrained(folder)
                write_json(folder / RECORD, run.record)
                write_json(folder / HISTORY, {"encoder": history})
            run.clean()
    return backbone


def train_encoder(
    backbone: Backbone, samples: Sequence[Sample], config: EncoderSchedule, work: Work
) -> History:
    """Harden a backbone's vision encoder in place; every other weight stays as it is.

    Raises:
        DataError: samples have no images.
        ImageError: an image can't be used.
        InputError: gradients can't pass through the processor.
        NoLanguageModel: the backbone is a dual encoder.
        CheckpointError: a checkpoint can't be written.
    """
    check_hardenable(backbone, samples)
    images = list({image_key(one): one for sample in samples for one in sample.images}.values())
    task = _Encoder(backbone, config)
    history = fit(task, Rows(images), _opened, config, work)
    task.vision.requires_grad_(False)
    return history


def check_hardenable(backbone: Backbone, samples: Sequence[Sample]) -> None:
    """See that a vision encoder can be hardened, and on these samples.

    Raises:
        NoLanguageModel, InputError, DataError: as `train_encoder`.
    """
    backbone.check_writes("hardening a vision encoder")
    Pixels(backbone.processor)
    if not any(sample.images for sample in samples):
        raise DataError("the samples have no images: a vision encoder has nothing to learn there")


def _opened(images: Sequence[Source]) -> dict[str, Any]:
    return {"pictures": [frame for image in images for frame in open_images(image)]}


class _Encoder(Task):
    """How far h_o is from what it was, under attack and as it is."""

    def __init__(self, backbone: Backbone, config: EncoderSchedule) -> None:
        super().__init__()
        self.backbone = backbone
        self.vision = backbone.model.get_encoder(modality="image")
        self.hardener = Hardener(backbone, Hardening(eps=config.eps, steps=config.steps))
        self.original = _twin(backbone, self.vision)
        self.vision.requires_grad_(True)

    def train(self, mode: bool = True) -> _Encoder:
        return super().train(False)  # no dropout: an attack is on the encoder as it will be

    def forward(self, pictures: list[Image]) -> dict[str, Tensor]:
        """The mean over B images of both distances, in variances of an image's features."""
        wanted = self.original.encode(pictures).maps  # [H, W, Dv] of each

        def distance(maps: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
            pairs = zip(maps, rows, strict=True)
            far = [(one - wanted[row]).square().mean() / wanted[row].var() for one, row in pairs]
            return torch.stack(far).mean()

        rows = range(len(pictures))
        clean = self.backbone.encode_inputs(*self.backbone.process(pictures)).maps
        return {"loss": distance(clean, rows) + distance(self.hardener(pictures, distance), rows)}


def _twin(backbone: Backbone, vision: nn.Module) -> Backbone:
    """The backbone as it is now: a copy of its vision encoder, and all else shared."""
    own = {id(weight) for weight in vision.parameters()}
    shared = {id(one): one for one in backbone.model.parameters() if id(one) not in own}
    return Backbone(copy.deepcopy(backbone.model, shared), backbone.processor)
