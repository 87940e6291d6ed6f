"""The safety projector g: a C-Abstractor that turns vision features h_o into safety features h_s.

Shape letters: B batch, N image positions, C channels, H x W grid, Q safety queries, Dv vision
width, D language-model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt

from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-5
SQUEEZE_RATIO = 0.25


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of ``[B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)  # [B, C, H, W]


class ConvNorm(nn.Module):
    """A convolution without bias, then :class:`LayerNorm2d`; keeps the grid."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False
        )
        self.norm = LayerNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the mean over the grid."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        gate: Tensor = self.fc2(F.silu(self.fc1(mean))).sigmoid()  # [B, C, 1, 1]
        return x * gate  # [B, C, H, W]


class Bottleneck(nn.Module):
    """A RegNet-Y block with group size 1: 1x1, depthwise 3x3, squeeze-excite, 1x1, shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)
        self.se = SqueezeExcite(outputs, max(1, round(SQUEEZE_RATIO * inputs)))
        self.conv3 = ConvNorm(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else ConvNorm(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv1(x))  # [B, C, H, W]
        y = F.silu(self.conv2(y))  # [B, C, H, W]
        y = self.conv3(self.se(y))  # [B, C, H, W]
        return F.silu(y + self.shortcut(x))  # [B, C, H, W]


class SafetyProjector(nn.Module):
    """C-Abstractor (Honeybee), the paper's safety projector g: h_o -> h_s.

    Args:
        vision_width: Dv, width of the vision features.
        hidden: channels of the convolutional blocks (1088 in the paper).
        text_width: D, width of the language model.
        depth: blocks before, and again after, the pooling (3 in the paper).
        readout_depth: linear layers of the closing MLP (2 in the paper).
    """

    def __init__(
        self,
        vision_width: int,
        hidden: int,
        text_width: int,
        depth: int = 3,
        readout_depth: int = 2,
    ) -> None:
        super().__init__()
        self.stage1 = _stage([vision_width] + [hidden] * depth)
        self.stage2 = _stage([hidden] * (depth + 1))
        widths = [hidden] + [text_width] * readout_depth
        self.readout = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(
        self, vision_features: Tensor, grid: tuple[int, int], queries: tuple[int, int]
    ) -> Tensor:
        """Map ``[B, N, Dv]`` laid out row by row on ``grid`` to ``[B, Q, D]`` on ``queries``."""
        x: Tensor = vision_features.unflatten(1, grid)  # [B, H, W, Dv]
        x = x.permute(0, 3, 1, 2)  # [B, Dv, H, W]
        x = self.stage1(x)  # [B, C, H, W]
        x = F.adaptive_avg_pool2d(x, queries)  # [B, C, Hq, Wq]
        x = self.stage2(x)  # [B, C, Hq, Wq]
        x = x.flatten(2).transpose(1, 2)  # [B, Q, C]
        for index, layer in enumerate(self.readout):
            x = layer(F.silu(x) if index else x)  # [B, Q, D]
        return x


def _stage(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(a, b) for a, b in pairwise(widths)))


def square_grid(positions: int) -> tuple[int, int] | None:
    """Side lengths of a square grid of ``positions`` cells, or None if there is no such grid."""
    side = isqrt(positions)
    return (side, side) if side * side == positions else None
