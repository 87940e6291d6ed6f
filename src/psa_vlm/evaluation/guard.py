"""A guard before the model: a linear classifier on what the frozen model sees and reads.

Shape letters: B requests, Dv width of vision features, Dt width of embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Sample
from psa_vlm.errors import CheckpointError, DataError, MissingExtra
from psa_vlm.model.backbone import Backbone

HARMLESS_LEVELS = ("safe", "low")
"""Levels of the paper's taxonomy that a guard lets through."""


class Guard(nn.Module):
    """Says how likely a request is risky, by one logistic regression.

    It reads the mean vision feature of a request's images beside the mean embedding of its words,
    each number scaled by what training saw.

    Args:
        width: Dv + Dt.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, Dv + Dt]`` -> logits ``[B]`` of being risky."""
        logits: Tensor = self.linear((features - self.mean) / self.scale).squeeze(-1)
        return logits

    @torch.no_grad()
    def risky(
        self, backbone: Backbone, images: Sequence[Sequence[Source]], texts: Sequence[str]
    ) -> list[float]:
        """How likely each of B requests is risky; NaN where that can't be computed."""
        found: list[float] = self(features(backbone, images, texts)).sigmoid().tolist()
        return found

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Guard:
        """Read what `save` wrote.

        Raises:
            CheckpointError: it can't be read.
        """
        try:
            state = load_file(path)
            guard = cls(len(state["mean"]))
            guard.load_state_dict(state)
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a guard ({error})") from error
        return guard.eval().requires_grad_(False)


@torch.no_grad()
def features(
    backbone: Backbone, images: Sequence[Sequence[Source]], texts: Sequence[str]
) -> Tensor:
    """``[B, Dv + Dt]`` in float32 on the CPU; zeros stand for the images of a request without."""
    rows = []
    for sources, text in zip(images, texts, strict=True):
        frames = [frame for source in sources for frame in open_images(source)]
        seen = torch.zeros(backbone.vision_width)
        if frames:
            maps = backbone.encode(frames, [len(frames)]).maps  # each [H, W, Dv]
            seen = torch.stack([one.float().mean((0, 1)).cpu() for one in maps]).mean(0)
        words, mask = backbone.embed_text([text])  # [1, T, Dt], [1, T]
        rows.append(torch.cat([seen, words[0][mask[0]].float().mean(0).cpu()]))
    return torch.stack(rows)


def train_guard(backbone: Backbone, samples: Sequence[Sample]) -> Guard:
    """Fit a guard on labelled samples, both kinds weighing the same.

    Raises:
        DataError: there are not both risky and harmless labelled samples.
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("scikit-learn", "eval") from error

    labelled = [one for one in samples if one.level is not None]
    risky = [one.level not in HARMLESS_LEVELS for one in labelled]
    if len(set(risky)) < 2:
        raise DataError("a guard learns from risky and from harmless labelled samples: give both")
    seen = features(backbone, [one.images for one in labelled], [one.question for one in labelled])
    scaler = StandardScaler().fit(seen.double().numpy())
    fitted = LogisticRegression(class_weight="balanced", max_iter=1000)
    fitted.fit(scaler.transform(seen.double().numpy()), risky)
    guard = Guard(seen.shape[1]).requires_grad_(False)
    guard.mean.copy_(torch.from_numpy(scaler.mean_))
    guard.scale.copy_(torch.from_numpy(scaler.scale_))
    guard.linear.weight.copy_(torch.from_numpy(fitted.coef_))
    guard.linear.bias.copy_(torch.from_numpy(fitted.intercept_))
    return guard.eval()
