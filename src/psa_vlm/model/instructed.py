"""Models whose projector reads the question: their images are projected when the prompt is known.

Shape letters: B prompts, C images, L prompt length, T length of a question, N image positions,
Q positions that an image fills, Dv vision width, D language-model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from psa_vlm.model.families import InstructedSpec
from psa_vlm.model.image_features import ImageFeatures

if TYPE_CHECKING:
    from psa_vlm.model.backbone import Backbone


def questions(backbone: Backbone, facts: InstructedSpec, texts: Sequence[str]) -> dict[str, Tensor]:
    """The questions of B prompts as the projector reads them: ids and mask ``[B, T]``."""
    tokenizer = getattr(backbone.processor, facts.question_tokenizer)
    longest = getattr(backbone.model.config, facts.question_config).max_position_embeddings
    read = tokenizer(  # a longer one is cut: the language model and the verdict have all of it
        list(texts),
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=longest,
        split_special_tokens=True,
        return_tensors="pt",
    )
    return {"question_ids": read["input_ids"], "question_mask": read["attention_mask"]}


def joined(
    backbone: Backbone,
    facts: InstructedSpec,
    inputs: Mapping[str, Tensor],
    features: ImageFeatures | None,
) -> dict[str, Any]:
    """Prompts as embeddings ``[B, L, D]`` with the images in them, for the language model alone."""
    here = inputs["input_ids"] == backbone.image_token_id  # [B, L]
    rest = dict(inputs)
    ids, mask = rest.pop("question_ids"), rest.pop("question_mask")
    embeds = backbone.model.get_input_embeddings()(rest.pop("input_ids"))  # [B, L, D]
    if features is not None:
        counts = here.sum(1) // features.positions[0]
        asked = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        seen = torch.stack(features.projected.pooler_output)  # [C, (1+)N, Dv]
        with torch.no_grad():
            h_i = facts.project(backbone.model, seen, ids[asked], mask[asked])  # [C, Q, D]
        embeds = embeds.masked_scatter(here[..., None], h_i.to(embeds))
    return {**rest, "inputs_embeds": embeds}
