"""Stage I, concepts: the bottleneck learns types and levels from cached vision features."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import set_seed

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, without_image_marks
from psa_vlm.errors import DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.config import ConceptsConfig, Hardening
from psa_vlm.training.features import FeatureCache, image_key
from psa_vlm.training.fit import History, Rows, Task, Work, fit
from psa_vlm.training.hardening import Hardener, noisy
from psa_vlm.training.processes import main_first

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class _Row:
    """One picture of a sample, with the sample's labels."""

    key: str
    frame: int
    text: str
    type: int
    level: int
    image: Path | Image


class _Concepts(Task):
    """The concept losses (paper: stage I), ``weight * (CE_level + CE_type)``."""

    def __init__(
        self,
        bottleneck: SafetyBottleneck,
        backbone: Backbone,
        weight: float,
        hardening: Hardening,
        type_weights: Tensor | None,
        level_weights: Tensor | None,
    ) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.backbone = backbone
        self.weight = weight
        self.type_weights = type_weights
        self.level_weights = level_weights
        self.hardening = hardening
        self.hardener = Hardener(backbone, hardening) if hardening.on_pixels else None

    def forward(
        self,
        features: Tensor | list[Tensor],
        texts: list[str],
        types: Tensor,
        levels: Tensor,
        pictures: list[Image] | None = None,
    ) -> dict[str, Tensor]:
        """Args: B features ``[H, W, Dv]``, stacked if alike; B texts; B type and level ids; the
        first few of the B pictures, to be made harder."""
        begin = self.bottleneck.config.begin
        h_t, mask = self.backbone.embed_text(texts, begin)  # [B, T, D], [B, T]

        def loss(maps: list[Tensor], rows: list[int]) -> Tensor:
            output = self.bottleneck.read(maps, h_t[rows], mask[rows])
            type_weights = _like(self.type_weights, output)
            level_weights = _like(self.level_weights, output)
            type_loss = F.cross_entropy(output.type_logits, types[rows], type_weights)
            level_loss = F.cross_entropy(output.level_logits, levels[rows], level_weights)
            return self.weight * (level_loss + type_loss)

        maps = list(features)
        if self.hardening.feature_noise:
            maps = noisy(maps, self.hardening.feature_noise)
        plain = loss(maps, list(range(len(maps))))
        if self.hardener is None or not pictures:
            return {"loss": plain}
        harder = loss(self.hardener(pictures, loss), list(range(len(pictures))))
        share = self.hardening.share
        return {"loss": (1 - share) * plain + share * harder}


def train_concepts(
    backbone: Backbone,
    taxonomy: Taxonomy,
    samples: Sequence[Sample],
    config: ConceptsConfig,
    work: Work,
) -> tuple[SafetyBottleneck, History]:
    """Train a bottleneck on labelled samples; the backbone is only read.

    Of a sample with several images, each is taught with the sample's labels.

    Raises:
        DataError: samples without image or labels, which it counts; or a label of another taxonomy.
        ImageError: an image can't be used.
        InputError: attacks in training are asked for, and gradients can't pass the processor.
        CheckpointError: features or a checkpoint can't be written.
    """
    check_labelled(samples)
    keyed = [[(image_key(image), image) for image in sample.images] for sample in samples]
    with main_first():
        cache = FeatureCache(work.folder / "features", backbone, config.cache_gb * 1e9)
        cache.add((pair for pairs in keyed for pair in pairs), config.encode_batch)
    rows = [
        _Row(
            key,
            frame,
            verdict_text(sample),
            taxonomy.type_id(sample.type or ""),
            taxonomy.level_id(sample.level or ""),
            image,
        )
        for sample, pairs in zip(samples, keyed, strict=True)
        for key, image in pairs
        for frame in range(cache.frames(key))
    ]
    set_seed(work.seed)
    bottleneck = SafetyBottleneck(
        BottleneckConfig(
            vision_width=cache.read([rows[0].key])[rows[0].key].shape[-1],
            text_width=backbone.text_width,
            types=len(taxonomy.types),
            levels=len(taxonomy.levels),
            **config.model_dump(include=set(_SIZES)),
        )
    ).to(backbone.device)
    weights: list[Tensor | None] = [None, None]
    if config.class_balance:
        weights = [
            class_weights([row.type for row in rows], len(taxonomy.types)),
            class_weights([row.level for row in rows], len(taxonomy.levels)),
        ]

    def collate(batch: list[_Row]) -> dict[str, Any]:
        found = cache.read(row.key for row in batch)
        maps = [found[row.key][row.frame] for row in batch]
        alike = len({features.shape for features in maps}) == 1
        return {
            "features": torch.stack(maps) if alike else maps,
            "texts": [row.text for row in batch],
            "types": torch.tensor([row.type for row in batch]),
            "levels": torch.tensor([row.level for row in batch]),
            **({"pictures": pictures(batch)} if config.hardening.on_pixels else {}),
        }

    def pictures(batch: list[_Row]) -> list[Image]:
        harder = batch[: math.ceil(config.hardening.share * len(batch))]
        return [open_images(row.image)[row.frame] for row in harder]

    if not cache.complete:  # a process that reads ahead can't use the GPU
        config = config.model_copy(update={"workers": 0})
    task = _Concepts(bottleneck, backbone, config.weight, config.hardening, *weights)
    history = fit(task, Rows(rows), collate, config, work)
    return bottleneck.eval(), history


_SIZES = (
    *("hidden", "tokens", "heads", "depth", "readout_depth"),
    *("pooling", "queries", "projector"),
)


def verdict_text(sample: Sample) -> str:
    """All that the user said, which is what a verdict is computed from at inference."""
    said = [turn.text for turn in sample.conversation if turn.role == "user"]
    return without_image_marks("\n".join(said))


def check_labelled(samples: Sequence[Sample]) -> None:
    """See that concepts can be learned from every sample.

    Raises:
        DataError: counts those without an image, labels or a question, and names the first.
    """
    for what, wanting in (
        ("image", [s for s in samples if not s.images]),
        ("type or level", [s for s in samples if s.type is None or s.level is None]),
        ("question", [s for s in samples if not verdict_text(s).strip()]),
    ):
        if wanting:
            raise DataError(
                f"{len(wanting)} of {len(samples)} samples have no {what}, {wanting[0].id} the"
                " first: stage I learns concepts from each; complete or remove them"
            )


def class_weights(labels: Sequence[int], classes: int) -> Tensor:
    """Weights ``[classes]`` by inverse frequency, 1 on average over the labels; 0 where unseen."""
    counts = Counter(labels)
    share = len(labels) / len(counts)
    return torch.tensor([share / counts[i] if counts[i] else 0.0 for i in range(classes)])


def _like(weights: Tensor | None, output: Any) -> Tensor | None:
    return None if weights is None else weights.to(output.type_logits)
