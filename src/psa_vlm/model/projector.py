"""The safety projector g: a C-Abstractor that turns vision features h_o into safety features h_s.

Shape letters: B batch, N image positions, C channels, H x W grid, Q safety queries, Dv vision
width, D language-model width. Channels stand last throughout, as the vision features come and the
language model wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Projector = Literal["abstractor", "linear"]
NORM_EPS = 1e-5
SQUEEZE_RATIO = 0.25


class Pointwise(nn.Conv2d):
    """A 1x1 convolution of ``[..., C]``: a linear layer that keeps a convolution's weights."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Depthwise(nn.Conv2d):
    """A 3x3 convolution of each channel of ``[B, H, W, C]`` by itself; keeps the grid."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C]


class ConvNorm(nn.Module):
    """A convolution, then layer normalisation over the channels."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.LayerNorm(conv.out_channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from the mean over the grid."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = Pointwise(channels, reduced)
        self.fc2 = Pointwise(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2), keepdim=True)  # [B, 1, 1, C]
        gate: Tensor = self.fc2(F.silu(self.fc1(mean))).sigmoid()  # [B, 1, 1, C]
        return x * gate  # [B, H, W, C]


class Bottleneck(nn.Module):
    """A RegNet-Y block with group size 1: 1x1, depthwise 3x3, squeeze-excite, 1x1, shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(Pointwise(inputs, outputs, bias=False))
        self.conv2 = ConvNorm(Depthwise(outputs))
        self.se = SqueezeExcite(outputs, max(1, round(SQUEEZE_RATIO * inputs)))
        self.conv3 = ConvNorm(Pointwise(outputs, outputs, bias=False))
        self.shortcut = (
            nn.Identity() if inputs == outputs else ConvNorm(Pointwise(inputs, outputs, bias=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv1(x))  # [B, H, W, C]
        y = F.silu(self.conv2(y))  # [B, H, W, C]
        y = self.conv3(self.se(y))  # [B, H, W, C]
        return F.silu(y + self.shortcut(x))  # [B, H, W, C]


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
        x = self.stage1(x)  # [B, H, W, C]
        x = self.stage2(_pooled(x, queries))  # [B, Hq, Wq, C]
        x = x.flatten(1, 2)  # [B, Q, C]
        for index, layer in enumerate(self.readout):
            x = layer(F.silu(x) if index else x)  # [B, Q, D]
        return x


class LinearProjector(nn.Module):
    """One linear layer for each position, h_o -> h_s, in the place of the C-Abstractor."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width)

    def forward(
        self, vision_features: Tensor, grid: tuple[int, int], queries: tuple[int, int]
    ) -> Tensor:
        """As :meth:`SafetyProjector.forward`."""
        x = _pooled(vision_features.unflatten(1, grid), queries)  # [B, Hq, Wq, Dv]
        h_s: Tensor = self.linear(x.flatten(1, 2))  # [B, Q, D]
        return h_s


def _pooled(x: Tensor, queries: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` averaged to the grid ``queries``."""
    if tuple(x.shape[1:3]) == tuple(queries):
        return x
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), queries).permute(0, 2, 3, 1)


def _stage(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(a, b) for a, b in pairwise(widths)))


def square_grid(positions: int) -> tuple[int, int] | None:
    """Side lengths of a square grid of ``positions`` cells, or None if there is no such grid."""
    side = isqrt(positions)
    return (side, side) if side * side == positions else None
