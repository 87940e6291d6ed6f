"""The safety head: cross-attention from the text to the safety features, and two classifiers.

Shape letters: B batch, T text positions, K safety tokens (1), Q safety queries, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["first", "text", "none"]


class SafetyHead(nn.Module):
    """Cross-attention CA with the linear classifiers W_l (level) and W_t (type).

    Args:
        width: D, width of text embeddings and safety features.
        heads: attention heads (8 in the paper).
        levels: number of risk levels.
        types: number of risk types, the clean one included.
        pooling: ``"text"`` makes the cross-attention a whole transformer block (norms, residual,
            MLP), so that what a word means beside what it attends to can be told, and weighs
            every real text position by a learned score, so that the whole text counts and
            padding never does; ``"first"`` is the bare attention, read at the first text position
            whatever the mask, as in the authors' code; ``"none"`` leaves the text and the attention
            out, and classifies the mean over tokens and image.
    """

    def __init__(self, width: int, heads: int, levels: int, types: int, pooling: Pooling) -> None:
        super().__init__()
        self.attention = (
            None if pooling == "none" else nn.MultiheadAttention(width, heads, batch_first=True)
        )
        self.to_level = nn.Linear(width, levels)
        self.to_type = nn.Linear(width, types)
        self.reader = _Reader(width) if pooling == "text" else None

    def forward(
        self, text_embeds: Tensor, text_mask: Tensor, tokens: Tensor, safety_features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify an image in the light of its text.

        Args:
            text_embeds: h_t ``[B, T, D]``.
            text_mask: ``[B, T]``, non-zero where the text is real. A row without any real
                position has no verdict: its logits come out as NaN under ``"text"``.
            tokens: s_t(1) ``[1, K, D]``.
            safety_features: h_s ``[B, Q, D]``.

        Returns:
            Level logits ``[B, levels]``, type logits ``[B, types]``, and the attention of each
            text position to each safety query ``[B, T, Q]`` (mean over the heads; zero in rows
            of padding; the same everywhere under ``"none"``).
        """
        real = text_mask.bool().unsqueeze(-1)  # [B, T, 1]
        tokens = tokens.expand(len(text_embeds), -1, -1)  # [B, K, D]
        h_t, h_scomb = text_embeds, torch.cat([tokens, safety_features], dim=1)  # [B, K+Q, D]
        if self.reader is not None:
            h_t, h_scomb = self.reader.text_norm(h_t), self.reader.image_norm(h_scomb)
        if self.attention is None:
            pooled = h_scomb.mean(dim=1)  # [B, D]
            weights = h_scomb.new_full((*h_t.shape[:2], h_scomb.shape[1]), 1 / h_scomb.shape[1])
        else:
            attended, weights = self.attention(h_t, h_scomb, h_scomb)  # [B, T, D], [B, T, K+Q]
            pooled = attended[:, 0] if self.reader is None else self.reader(h_t + attended, real)
        attention = weights[:, :, tokens.shape[1] :]  # [B, T, Q]
        return self.to_level(pooled), self.to_type(pooled), attention.masked_fill(~real, 0.0)


class _Reader(nn.Module):
    """What ``pooling="text"`` adds to the attention: norms, an MLP, and a learned average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # starts as the mean over the text

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Pool ``x [B, T, D]`` over the real positions ``[B, T, 1]`` to ``[B, D]``."""
        x = (x + self.mlp(x)).masked_fill(~real, 0.0)  # [B, T, D]
        scores = self.score(x).masked_fill(~real, float("-inf"))  # [B, T, 1]
        pooled: Tensor = (scores.softmax(dim=1) * x).sum(dim=1)  # [B, D]
        return pooled
