"""Parity with the authors' modules: recorded numbers, and an independent functional reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from psa_vlm.errors import CheckpointError
from psa_vlm.model.bottleneck import SafetyBottleneck, concept_loss
from psa_vlm.model.official import official_prompt_tokens

TENSORS = load_file(Path(__file__).parents[1] / "data" / "parity" / "official_tiny.safetensors")
P = "safe_mm_projector.proj."


def under(prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)}


def test_recorded_numbers_are_reproduced() -> None:
    given, expected = under("input."), under("expected.")
    bottleneck = SafetyBottleneck.from_official(under("state."))
    with torch.no_grad():
        out = bottleneck(
            given["vision_features"], given["text_embeds"], given["attention_mask"], (6, 6)
        )
        loss = concept_loss(out, given["level_labels"], given["type_labels"])
    for name in ("safety_features", "level_logits", "type_logits"):
        torch.testing.assert_close(getattr(out, name), expected[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["concept_loss"].squeeze(), atol=1e-5, rtol=0)
