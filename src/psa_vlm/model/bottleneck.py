"""The safety bottleneck: safety projector, safety tokens (1) and safety head in one module.

Shape letters: B batch, N image positions, Dv vision width, T text positions, D language-model
width, Q safety queries, K safety tokens (1), H x W grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psa_vlm.errors import ConfigError, InputError
from psa_vlm.model.head import Pooling, SafetyHead
from psa_vlm.model.projector import LinearProjector, Projector, SafetyProjector, square_grid

TOKEN_STD = 0.02
CONCEPT_WEIGHT = 10.0


@dataclass(frozen=True)
class BottleneckConfig:
    """Sizes of a :class:`SafetyBottleneck`; the defaults are the paper's."""

    vision_width: int
    """Dv, width of the vision features."""
    text_width: int
    """D, width of the language model's embeddings."""
    hidden: int = 1088
    """Channels of the projector's convolutions."""
    tokens: int = 64
    """K, number of safety tokens (1); 0 is none."""
    heads: int = 8
    """Heads of the cross-attention; must divide ``text_width``."""
    levels: int = 4
    """Number of risk levels."""
    types: int = 7
    """Number of risk types, the clean one included."""
    depth: int = 3
    """Projector blocks before, and again after, the pooling."""
    readout_depth: int = 2
    """Linear layers of the projector's closing MLP."""
    pooling: Pooling = "text"
    """How the head reads the text: see :class:`~psa_vlm.model.head.SafetyHead`."""
    queries: tuple[int, int] | None = None
    """Grid of the safety features (rows, columns); None keeps the grid of the image."""
    projector: Projector = "abstractor"
    """The C-Abstractor, or one linear layer, which has no hidden channels and no depth."""

    @property
    def begin(self) -> bool:
        """Whether texts are read from a begin mark on, which is the authors' first position."""
        return self.pooling == "first"

    def __post_init__(self) -> None:
        if self.queries is not None:
            object.__setattr__(self, "queries", tuple(self.queries))  # JSON has lists only
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        for name, value in counts.items():
            least = 0 if name == "tokens" else 1
            if value < least:
                raise ConfigError(f"bottleneck {name} is {value}: give a number of {least} or more")
        if self.text_width % self.heads:
            raise ConfigError(
                f"bottleneck text_width {self.text_width} is not a multiple of heads "
                f"{self.heads}: choose heads that divide it"
            )
        for name, kinds in (("pooling", Pooling), ("projector", Projector)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise ConfigError(
                    f"bottleneck {name} is {value!r}: choose one of {get_args(kinds)}"
                )
        if self.queries is not None and (len(self.queries) != 2 or min(self.queries) < 1):
            raise ConfigError(
                f"bottleneck queries is {self.queries}: give (rows, columns), each 1 or more"
            )


@dataclass(frozen=True)
class BottleneckOutput:
    """What the bottleneck says about B images, each with its text."""

    safety_features: Tensor
    """h_s ``[B, Q, D]``."""
    level_logits: Tensor
    """``[B, levels]``."""
    type_logits: Tensor
    """``[B, types]``."""
    attention: Tensor
    """``[B, T, Q]``, from text positions to safety queries; zero in rows of padding."""


class SafetyBottleneck(nn.Module):
    """Vision features and text in, concepts out (paper: g, s_t(1), CA, W_l, W_t)."""

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = (
            LinearProjector(config.vision_width, config.text_width)
            if config.projector == "linear"
            else SafetyProjector(
                config.vision_width,
                config.hidden,
                config.text_width,
                config.depth,
                config.readout_depth,
            )
        )
        self.tokens = nn.Parameter(torch.randn(1, config.tokens, config.text_width) * TOKEN_STD)
        self.head = SafetyHead(
            config.text_width, config.heads, config.levels, config.types, config.pooling
        )

    def forward(
        self,
        vision_features: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> BottleneckOutput:
        """Compute the concepts of B images, each in the light of its text.

        Inputs are brought to the module's own device and dtype, and outputs stay there: a
        float32 bottleneck reads the features of a bfloat16 backbone.

        Args:
            vision_features: h_o ``[B, N, Dv]``, the image positions row by row.
            text_embeds: h_t ``[B, T, D]``.
            text_mask: ``[B, T]``, non-zero where the text is real.
            grid: rows and columns of the image positions; None means a square.

        Raises:
            InputError: if shapes do not fit together; the message says which.
        """
        grid = self._checked_grid(vision_features, text_embeds, text_mask, grid)
        h_o = vision_features.to(self.tokens)  # [B, N, Dv]
        h_t = text_embeds.to(self.tokens)  # [B, T, D]
        mask = text_mask.to(self.tokens.device)  # [B, T]
        h_s = self.projector(h_o, grid, self.config.queries or grid)  # [B, Q, D]
        level, type_, attention = self.head(h_t, mask, self.tokens, h_s)
        return BottleneckOutput(h_s, level, type_, attention)

    def read(
        self, maps: Sequence[Tensor], text_embeds: Tensor, text_mask: Tensor
    ) -> BottleneckOutput:
        """`forward` for B images whose grids may differ.

        Images of one grid are computed together, and no image changes what is said of another:
        a convolution over padding would.

        Args:
            maps: h_o of each image ``[H, W, Dv]``.
            text_embeds: h_t ``[B, T, D]``.
            text_mask: ``[B, T]``, non-zero where the text is real.

        Returns:
            What is said of them in order. Q is that of the largest grid; of a smaller one the
            first positions are meant, and the rest is zero.

        Raises:
            InputError: if shapes do not fit together; the message says which.
        """
        if len(maps) != len(text_embeds):
            raise InputError(f"{len(maps)} images but {len(text_embeds)} texts: give one for each")
        rows: dict[tuple[int, int], list[int]] = {}
        for row, features in enumerate(maps):
            rows.setdefault((features.shape[0], features.shape[1]), []).append(row)
        if len(rows) == 1:
            (grid,) = rows
            h_o = torch.stack(list(maps)).flatten(1, 2)  # [B, N, Dv]
            output: BottleneckOutput = self(h_o, text_embeds, text_mask, grid)
            return output
        outputs: list[BottleneckOutput] = [
            self(
                torch.stack([maps[row] for row in group]).flatten(1, 2),
                text_embeds[group],
                text_mask[group],
                grid,
            )
            for grid, group in rows.items()
        ]
        order = torch.tensor([row for group in rows.values() for row in group]).argsort()
        widest = max(output.attention.shape[-1] for output in outputs)
        h_s = [_longer(output.safety_features, 1, widest) for output in outputs]
        attention = [_longer(output.attention, 2, widest) for output in outputs]
        return BottleneckOutput(
            torch.cat(h_s)[order],
            torch.cat([output.level_logits for output in outputs])[order],
            torch.cat([output.type_logits for output in outputs])[order],
            torch.cat(attention)[order],
        )

    @classmethod
    def from_official(
        cls,
        state: Mapping[str, Tensor],
        *,
        heads: int = 8,
        queries: tuple[int, int] | None = None,
    ) -> SafetyBottleneck:
        """Build from the authors' parameters: see :func:`psa_vlm.model.official.load`."""
        from psa_vlm.model import official

        return official.load(state, heads=heads, queries=queries)

    def _checked_grid(
        self,
        vision_features: Tensor,
        text_embeds: Tensor,
        text_mask: Tensor,
        grid: tuple[int, int] | None,
    ) -> tuple[int, int]:
        config = self.config
        wanted = {
            "vision_features": (vision_features, f"[B, N, {config.vision_width}]"),
            "text_embeds": (text_embeds, f"[B, T, {config.text_width}]"),
        }
        for name, (tensor, shape) in wanted.items():
            width = int(shape.split()[-1].rstrip("]"))
            if tensor.ndim != 3 or tensor.shape[-1] != width:
                raise InputError(f"{name} has shape {list(tensor.shape)}: expected {shape}")
        if len(vision_features) != len(text_embeds) or text_mask.shape != text_embeds.shape[:2]:
            raise InputError(
                f"vision_features {list(vision_features.shape)}, text_embeds "
                f"{list(text_embeds.shape)} and text_mask {list(text_mask.shape)} do not agree: "
                "expected [B, N, Dv], [B, T, D] and [B, T]"
            )
        positions = vision_features.shape[1]
        square = square_grid(positions)
        if grid is None and square is None:
            raise InputError(
                f"{positions} image positions form no square: pass grid=(rows, columns)"
            )
        if grid is not None and grid[0] * grid[1] != positions:
            raise InputError(f"grid {tuple(grid)} does not hold {positions} image positions")
        return grid or square or (0, 0)


def _longer(x: Tensor, dim: int, length: int) -> Tensor:
    """``x`` with zeros behind it along ``dim``."""
    after = [0, 0] * (x.ndim - 1 - dim) + [0, length - x.shape[dim]]
    return F.pad(x, after)


def concept_loss(
    output: BottleneckOutput,
    level_labels: Tensor,
    type_labels: Tensor,
    weight: float = CONCEPT_WEIGHT,
) -> Tensor:
    """The paper's stage I concept loss, ``weight * (CE_level + CE_type)``, as a scalar.

    Args:
        output: of B samples.
        level_labels: ``[B]`` level ids.
        type_labels: ``[B]`` type ids.
        weight: 10 in the paper.
    """
    level = F.cross_entropy(output.level_logits, level_labels.to(output.level_logits.device))
    type_ = F.cross_entropy(output.type_logits, type_labels.to(output.type_logits.device))
    return weight * (level + type_)
