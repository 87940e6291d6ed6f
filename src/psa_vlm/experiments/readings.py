"""What each module of a bottleneck makes of requests, and held-out requests to read it from.

Shape letters: B requests, n samples, N image positions, Dv vision width, T text positions, D
language-model width, Q safety queries, K safety tokens (1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample
from psa_vlm.evaluation.risk_control import Array
from psa_vlm.inference import PsaVlm
from psa_vlm.model.bottleneck import TOKEN_STD
from psa_vlm.progress import track
from psa_vlm.testbed.cases import FOREIGN, OWN, Split, draw_sample
from psa_vlm.testbed.world import ASK, DESCRIBE, world
from psa_vlm.training.concepts import verdict_text

BATCH = 64
SETTINGS = ("alone", "companion", "person")


@dataclass(frozen=True)
class Readings:
    """What the modules make of n requests, and their labels.

    Attributes:
        vision: h_o ``[n, Dv]``, mean over the image positions.
        safety: h_s ``[n, D]``, mean over the safety queries.
        pooled: what the head's classifiers read ``[n, D]``.
        types, levels: probabilities ``[n, types]`` and ``[n, levels]``.
        safe: P(level safe) with each of `VARIANTS` ``[n, 4]``.
        on_tokens: share of the head's attention that goes to the safety tokens (1) ``[n]``.
        type_ids, level_ids: labels ``[n]``.
        side: 0 or 1 ``[n]``; no set of things is shown on both.
    """

    vision: Array
    safety: Array
    pooled: Array
    types: Array
    levels: Array
    safe: Array
    on_tokens: Array
    type_ids: Array
    level_ids: Array
    side: Array

    def take(self, rows: np.ndarray) -> Readings:
        """Some of the requests, by index or mask."""
        return Readings(**{name: value[rows] for name, value in vars(self).items()})


VARIANTS = ("as trained", "taken out", "zero", "untrained")
"""What may stand in the place of the safety tokens (1)."""


def variants(tokens: Tensor, seed: int) -> list[Tensor]:
    """`VARIANTS` of safety tokens ``[1, K, D]``.

    Taken out, there are K = 0: the head's attention is spread over the image alone, as under a
    mask. Zero leaves their places with nothing in them; untrained are new draws, as training
    begins.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tokens.shape, generator=generator) * TOKEN_STD
    return [tokens, tokens[:, :0], torch.zeros_like(tokens), drawn.to(tokens)]


@torch.inference_mode()
def read(model: PsaVlm, samples: Sequence[Sample], seed: int) -> Readings:
    """One vision pass over samples of one picture each, and the head once with each variant."""
    bottleneck, backbone, words = model.bottleneck, model.backbone, model.taxonomy
    chosen = variants(bottleneck.tokens, seed)
    parts: dict[str, list[Tensor]] = {}
    seen_by_head: list[Tensor] = []
    hook = bottleneck.head.to_level.register_forward_pre_hook(
        lambda _, inputs: seen_by_head.append(inputs[0])
    )
    for start in track(range(0, len(samples), BATCH), "reading"):
        part = samples[start : start + BATCH]
        features = backbone.encode([open_images(one.images[0])[0] for one in part])
        begin = bottleneck.config.begin
        h_t, mask = backbone.embed_text([verdict_text(one) for one in part], begin)  # [B, T, D]
        h_t, mask = h_t.to(bottleneck.tokens), mask.to(bottleneck.tokens.device)
        h_o = features.h_o.to(bottleneck.tokens)  # [B, N, Dv]
        queries = bottleneck.config.queries or features.grid
        h_s = bottleneck.projector(h_o, features.grid, queries)  # [B, Q, D]
        seen_by_head.clear()
        said = [bottleneck.head(h_t, mask, tokens, h_s) for tokens in chosen]
        level, type_, attention = said[0]  # [B, levels], [B, types], [B, T, Q]
        found = {
            "vision": h_o.mean(1),
            "safety": h_s.mean(1),
            "pooled": seen_by_head[0],
            "types": type_.double().softmax(-1),
            "levels": level.double().softmax(-1),
            "safe": torch.stack([one.double().softmax(-1)[:, 0] for one, _, _ in said], 1),
            "on_tokens": 1 - attention.sum((1, 2)) / mask.bool().sum(1),
            "type_ids": torch.tensor([words.type_id(one.type or "") for one in part]),
            "level_ids": torch.tensor([words.level_id(one.level or "") for one in part]),
            "side": torch.tensor([_side(one) for one in part]),
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value.double().cpu())
    hook.remove()
    return Readings(**{name: torch.cat(values).numpy() for name, values in parts.items()})


def _side(sample: Sample) -> int:
    """By the set of things shown; what is held out is told by the last digit of the same number."""
    return crc32(sample.tags["things"].encode()) // 10 % 2


# --- what is drawn -------------------------------------------------------------------------------


def even_samples(split: Split, count: int, seed: int) -> list[Sample]:
    """Held-out requests with all types (clean too) evenly, any question and any setting."""
    rng = Random(f"modules/even/{split}/{seed}")
    types: list[str | None] = [*world().risk_types, None]
    drawn = []
    for i in range(count):
        risk = types[i % len(types)]
        asked = rng.choice((DESCRIBE, ASK, OWN, FOREIGN))
        setting = rng.choice(SETTINGS if risk else ("alone", "person"))
        drawn.append(draw_sample(rng, split, f"even-{split}-{seed}-{i}", risk, asked, setting))
    return drawn


def class_samples(per_class: int, seed: int) -> list[Sample]:
    """Every risk type at every level above safe, so many of each, and as many that are safe."""
    rng = Random(f"modules/classes/{seed}")
    levels = world().table["levels"]
    ways: dict[str, list[tuple[str, str]]] = {}
    for asked, row in levels.items():
        for setting, level in row.items():
            ways.setdefault(level, []).append((asked, setting))
    wanted: list[tuple[str | None, str]] = [
        (risk, level) for risk in world().risk_types for level in ways if level != "safe"
    ]
    wanted += [(None, "safe")]
    drawn = []
    for risk, level in wanted:
        for i in range(per_class):
            type_ = risk
            if risk is None and i % 2:  # half of the safe show a risky thing where nothing is wrong
                type_ = rng.choice(world().risk_types)
            asked, setting = rng.choice(ways[level])
            if type_ is None:
                asked, setting = rng.choice((DESCRIBE, ASK, FOREIGN)), "alone"
            name = f"{risk or 'harmless'}-{level}-{seed}-{i}"
            drawn.append(draw_sample(rng, "compositions", name, type_, asked, setting))
    return drawn
