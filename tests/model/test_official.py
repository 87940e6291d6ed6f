"""Parity with the authors' modules: recorded numbers, and an independent functional reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.model.bottleneck import SafetyBottleneck, concept_loss
from psa_vlm.model.official import official_prompt_tokens

TENSORS = load_file(Path(__file__).parents[1] / "data" / "parity" / "official_tiny.safetensors")
NET = "safe_mm_projector.proj.net"
READOUT = "safe_mm_projector.proj.readout"
State = dict[str, Tensor]


def under(prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)}


def test_recorded_numbers_are_reproduced() -> None:
    given, expected = under("input."), under("expected.")
    bottleneck = SafetyBottleneck.from_official(under("state."))
    with torch.no_grad():
        out = bottleneck(given["vision_features"], given["text_embeds"], given["attention_mask"])
        loss = concept_loss(out, given["level_labels"], given["type_labels"])
    for name in ("safety_features", "level_logits", "type_logits"):
        torch.testing.assert_close(getattr(out, name), expected[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["concept_loss"].squeeze(), atol=1e-5, rtol=0)


# --- a second opinion: the authors' forward in plain functions, over their own names --------------


def draw_state(
    vision: int, hidden: int, text: int, tokens: int, levels: int, types: int, depth: int, mlp: int
) -> State:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    generator = torch.Generator().manual_seed(vision + hidden)
    state = {
        "safety_query_tokens": draw(1, tokens, text),
        "safety_query_tokens_2": draw(1, tokens, text),
        "safe_part.cross_attention.in_proj_weight": draw(3 * text, text),
        "safe_part.cross_attention.in_proj_bias": draw(3 * text),
        "safe_part.cross_attention.out_proj.weight": draw(text, text),
        "safe_part.cross_attention.out_proj.bias": draw(text),
        "safe_part.safety_head.weight": draw(levels, text),
        "safe_part.safety_head.bias": draw(levels),
        "safe_part.other_head.weight": draw(types, text),
        "safe_part.other_head.bias": draw(types),
    }
    for stage in (0, 2):
        for block in range(1, depth + 1):
            name = f"{NET}.{stage}.b{block}"
            width = vision if (stage, block) == (0, 1) else hidden
            squeezed = round(0.25 * width)
            convs = {"conv1": (width, 1), "conv2": (1, 3), "conv3": (hidden, 1)}
            if width != hidden:
                convs["downsample"] = (width, 1)
            for conv, (inputs, kernel) in convs.items():
                state[f"{name}.{conv}.conv.weight"] = draw(hidden, inputs, kernel, kernel)
                state[f"{name}.{conv}.bn.weight"] = 1 + draw(hidden)
                state[f"{name}.{conv}.bn.bias"] = draw(hidden)
            state[f"{name}.se.fc1.weight"] = draw(squeezed, hidden, 1, 1)
            state[f"{name}.se.fc1.bias"] = draw(squeezed)
            state[f"{name}.se.fc2.weight"] = draw(hidden, squeezed, 1, 1)
            state[f"{name}.se.fc2.bias"] = draw(hidden)
    for layer in range(mlp):
        state[f"{READOUT}.{2 * layer}.weight"] = draw(text, text if layer else hidden)
        state[f"{READOUT}.{2 * layer}.bias"] = draw(text)
    return state


def reference(
    state: State,
    vision: Tensor,
    text: Tensor,
    grid: tuple[int, int],
    queries: tuple[int, int],
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def conv_norm(x: Tensor, name: str, groups: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        scale, shift = state[f"{name}.bn.weight"], state[f"{name}.bn.bias"]
        return x * scale[:, None, None] + shift[:, None, None]

    def block(x: Tensor, name: str) -> Tensor:
        y = F.silu(conv_norm(x, f"{name}.conv1"))
        y = F.silu(conv_norm(y, f"{name}.conv2", groups=y.shape[1]))
        gate = y.mean((2, 3), keepdim=True)
        gate = F.silu(F.conv2d(gate, state[f"{name}.se.fc1.weight"], state[f"{name}.se.fc1.bias"]))
        gate = F.conv2d(gate, state[f"{name}.se.fc2.weight"], state[f"{name}.se.fc2.bias"])
        y = conv_norm(y * torch.sigmoid(gate), f"{name}.conv3")
        has_shortcut = f"{name}.downsample.conv.weight" in state
        return F.silu(y + (conv_norm(x, f"{name}.downsample") if has_shortcut else x))

    def stage(x: Tensor, number: int) -> Tensor:
        index = 1
        while f"{NET}.{number}.b{index}.conv1.conv.weight" in state:
            x = block(x, f"{NET}.{number}.b{index}")
            index += 1
        return x

    batch, _, width = vision.shape
    x = vision.transpose(1, 2).reshape(batch, width, *grid)
    x = stage(F.adaptive_avg_pool2d(stage(x, 0), queries), 2)
    x = x.reshape(batch, x.shape[1], -1).transpose(1, 2)
    for layer in range(9):
        if f"{READOUT}.{2 * layer}.weight" in state:
            x = F.silu(x) if layer else x
            x = x @ state[f"{READOUT}.{2 * layer}.weight"].T + state[f"{READOUT}.{2 * layer}.bias"]
    features = x

    part = "safe_part.cross_attention"
    tokens = state["safety_query_tokens"].expand(batch, -1, -1)
    keys = torch.cat([tokens, features], dim=1)
    weights = state[f"{part}.in_proj_weight"].chunk(3)
    biases = state[f"{part}.in_proj_bias"].chunk(3)
    q, k, v = (
        (y @ w.T + b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for y, w, b in zip((text, keys, keys), weights, biases, strict=True)
    )
    attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    attended = (attention @ v).transpose(1, 2).flatten(2)
    attended = attended @ state[f"{part}.out_proj.weight"].T + state[f"{part}.out_proj.bias"]
    first = attended[:, 0]
    level = first @ state["safe_part.safety_head.weight"].T + state["safe_part.safety_head.bias"]
    type_ = first @ state["safe_part.other_head.weight"].T + state["safe_part.other_head.bias"]
    return features, level, type_, attention.mean(1)[..., tokens.shape[1] :]


CASES = {
    "other sizes": ((20, 24, 16, 5, 3, 9, 2, 2), (4, 4), None, 8),
    "no downsample": ((24, 24, 32, 1, 4, 7, 3, 2), (3, 3), None, 4),
    "rectangular, fewer queries": ((10, 12, 8, 3, 2, 2, 1, 2), (4, 6), (2, 3), 2),
    "rectangular, more queries": ((16, 8, 24, 7, 6, 4, 1, 3), (2, 5), (3, 7), 8),
}


@pytest.mark.parametrize(("sizes", "grid", "queries", "heads"), CASES.values(), ids=CASES.keys())
def test_reference_of_other_sizes_is_reproduced(
    sizes: tuple[int, ...], grid: tuple[int, int], queries: tuple[int, int] | None, heads: int
) -> None:
    state = draw_state(*sizes)
    generator = torch.Generator().manual_seed(1)
    positions, double = grid[0] * grid[1], torch.float64  # where rounding can't blur a difference
    vision = torch.randn(3, positions, sizes[0], generator=generator, dtype=double)
    text = torch.randn(3, 6, sizes[2], generator=generator, dtype=double)
    bottleneck = SafetyBottleneck.from_official(state, heads=heads, queries=queries).double()
    state = {name: tensor.double() for name, tensor in state.items()}
    with torch.no_grad():
        out = bottleneck(vision, text, torch.ones(3, 6), grid)
        expected = reference(state, vision, text, grid, queries or grid, heads)
    got = (out.safety_features, out.level_logits, out.type_logits, out.attention)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_sizes_are_read_from_the_tensors() -> None:
    config = SafetyBottleneck.from_official(draw_state(20, 24, 16, 5, 3, 9, 2, 2)).config
    assert (config.vision_width, config.hidden, config.text_width) == (20, 24, 16)
    assert (config.tokens, config.levels, config.types, config.depth) == (5, 3, 9, 2)
    assert (config.heads, config.pooling, config.queries) == (8, "first", None)


def test_prompt_tokens_are_rows() -> None:
    state = under("state.")
    rows = official_prompt_tokens(state)
    torch.testing.assert_close(rows, state["safety_query_tokens_2"][0])
    del state["safety_query_tokens_2"]
    SafetyBottleneck.from_official(state)  # the head does not need them
    with pytest.raises(CheckpointError, match="safety_query_tokens_2"):
        official_prompt_tokens(state)


@pytest.mark.parametrize(
    "key",
    [
        "safe_part.third_head.weight",
        "tokens",
        f"{READOUT}.1.weight",
        f"{NET}.1.b1.conv1.conv.weight",
        f"{NET}.0.b0.conv1.conv.weight",
        f"{NET}.0.b1.conv1.conv.bias",
    ],
)
def test_unknown_keys_are_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"unknown {key}"):
        SafetyBottleneck.from_official({**under("state."), key: torch.zeros(32)})


def test_missing_and_misshapen_keys_are_named() -> None:
    state = under("state.")
    with pytest.raises(CheckpointError, match=r"head\.to_level"):
        SafetyBottleneck.from_official({k: v for k, v in state.items() if "safety_head" not in k})
    bias = state.pop("safe_part.other_head.bias")
    with pytest.raises(CheckpointError, match=r"missing head\.to_type\.bias"):
        SafetyBottleneck.from_official(state)
    with pytest.raises(CheckpointError, match=r"safe_part\.other_head\.bias has shape \[6\]"):
        SafetyBottleneck.from_official({**state, "safe_part.other_head.bias": bias[:6]})
    with pytest.raises(ConfigError, match="heads"):
        SafetyBottleneck.from_official(under("state."), heads=5)
