"""The safety bottleneck as a whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from psa_vlm.errors import ConfigError, InputError
from psa_vlm.model.bottleneck import (
    BottleneckConfig,
    BottleneckOutput,
    SafetyBottleneck,
    concept_loss,
)
from psa_vlm.model.probe import probe

SIZES: dict[str, Any] = {"vision_width": 6, "text_width": 16, "hidden": 8, "tokens": 3, "depth": 1}


def bottleneck_of(**changes: Any) -> SafetyBottleneck:
    torch.manual_seed(0)
    bottleneck = SafetyBottleneck(BottleneckConfig(**{**SIZES, **changes})).eval()
    if bottleneck.head.reader is not None:
        torch.nn.init.normal_(bottleneck.head.reader.score.weight)
    return bottleneck


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(out: BottleneckOutput) -> tuple[torch.Tensor, torch.Tensor]:
    return out.level_logits, out.type_logits


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
)
def test_padding_and_batching_never_change_the_verdict(
    lengths: list[int], extra: int, side: str, seed: int
) -> None:
    bottleneck = bottleneck_of()
    images, width = draw(seed, len(lengths), 9, 6), max(lengths) + extra
    texts = [draw(seed + i, 1, n, 16) for i, n in enumerate(lengths)]
    alone = [
        bottleneck(images[i : i + 1], text, torch.ones(1, text.shape[1]))
        for i, text in enumerate(texts)
    ]
    embeds, mask = draw(seed + 50, len(lengths), width, 16), torch.zeros(len(lengths), width)
    for i, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        where = slice(0, n) if side == "right" else slice(width - n, width)
        embeds[i, where], mask[i, where] = text[0], 1
    together = bottleneck(images, embeds, mask)
    for i, single in enumerate(alone):
        for whole, one in zip(logits(together), logits(single), strict=True):
            torch.testing.assert_close(whole[i], one[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            together.attention[i][mask[i].bool()], single.attention[0], atol=1e-5, rtol=1e-4
        )


def test_another_text_can_get_another_verdict() -> None:
    bottleneck, image, mask = bottleneck_of(), draw(0, 1, 9, 6), torch.ones(1, 4)
    one = bottleneck(image, 20 * draw(1, 1, 4, 16), mask)
    two = bottleneck(image, 20 * draw(2, 1, 4, 16), mask)
    for a, b in zip(logits(one), logits(two), strict=True):
        assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(one.safety_features, two.safety_features)


@settings(max_examples=20)
@given(h=st.integers(1, 6), w=st.integers(1, 6))
def test_any_grid(h: int, w: int) -> None:
    out = bottleneck_of()(draw(0, 2, h * w, 6), draw(1, 2, 3, 16), torch.ones(2, 3), (h, w))
    assert out.safety_features.shape == (2, h * w, 16)
    assert out.attention.shape == (2, 3, h * w)
    assert (out.level_logits.shape, out.type_logits.shape) == ((2, 4), (2, 7))


@settings(max_examples=20)
@given(grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
def test_images_of_different_grids_do_not_touch_each_other(grids: list[tuple[int, int]]) -> None:
    bottleneck, mask = bottleneck_of(), torch.ones(len(grids), 3)
    maps, texts = [draw(i, *grid, 6) for i, grid in enumerate(grids)], draw(9, len(grids), 3, 16)
    out = bottleneck.read(maps, texts, mask)
    for i, (h, w) in enumerate(grids):
        one = slice(i, i + 1)
        alone = bottleneck(maps[i].reshape(1, h * w, 6), texts[one], mask[one], (h, w))
        torch.testing.assert_close(logits(out)[0][one], alone.level_logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(out)[1][one], alone.type_logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.attention[one, :, : h * w], alone.attention)
        assert not out.attention[one, :, h * w :].any()
        torch.testing.assert_close(
            out.safety_features[one, : h * w], alone.safety_features, atol=1e-5, rtol=1e-4
        )
    with pytest.raises(InputError, match="give one for each"):
        bottleneck.read(maps, texts[1:], mask[1:])


def test_without_a_grid_positions_form_a_square() -> None:
    bottleneck, mask = bottleneck_of(), torch.ones(1, 3)
    nine = draw(0, 1, 9, 6)
    text = draw(1, 1, 3, 16)
    torch.testing.assert_close(
        bottleneck(nine, text, mask).safety_features,
        bottleneck(nine, text, mask, (3, 3)).safety_features,
    )
    with pytest.raises(InputError, match="12 image positions form no square"):
        bottleneck(draw(0, 1, 12, 6), text, mask)
    with pytest.raises(InputError, match="does not hold 12"):
        bottleneck(draw(0, 1, 12, 6), text, mask, (3, 5))


def test_queries_fix_the_grid_of_the_features() -> None:
    config = BottleneckConfig(**SIZES, queries=(2, 3))
    again = BottleneckConfig(**json.loads(json.dumps(asdict(config))))
    assert again == config and hash(again) == hash(config)
    out = bottleneck_of(queries=(2, 3))(
        draw(0, 1, 20, 6), draw(1, 1, 3, 16), torch.ones(1, 3), (4, 5)
    )
    assert out.attention.shape == (1, 3, 6)


@pytest.mark.parametrize(
    ("vision", "text", "mask", "named"),
    [
        ((2, 9, 5), (2, 3, 16), (2, 3), "vision_features"),
        ((2, 9), (2, 3, 16), (2, 3), "vision_features"),
        ((2, 9, 6), (2, 3, 15), (2, 3), "text_embeds"),
        ((2, 9, 6), (3, 3, 16), (3, 3), "do not agree"),
        ((2, 9, 6), (2, 3, 16), (2, 4), "do not agree"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    vision: tuple[int, ...], text: tuple[int, ...], mask: tuple[int, ...], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        bottleneck_of()(torch.zeros(vision), torch.zeros(text), torch.ones(mask))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": 5}, "heads"),
        ({"tokens": -1}, "tokens is -1: give a number of 0 or more"),
        ({"hidden": 0}, "hidden is 0: give a number of 1 or more"),
        ({"pooling": "last"}, "pooling"),
        ({"projector": "mlp"}, "projector"),
        ({"queries": (0, 3)}, "queries"),
        ({"queries": (3,)}, "queries"),
    ],
)
def test_impossible_sizes_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BottleneckConfig(**{**SIZES, **changes})


def test_features_of_another_dtype_are_brought_to_the_module() -> None:
    image, text, mask = draw(0, 2, 9, 6), draw(1, 2, 3, 16), torch.ones(2, 3, dtype=torch.long)
    expected = bottleneck_of()(image, text, mask)
    got = bottleneck_of()(image.bfloat16(), text.bfloat16(), mask)
    assert got.level_logits.dtype == torch.float32
    torch.testing.assert_close(logits(got), logits(expected), atol=0.05, rtol=0.05)
    half = bottleneck_of().bfloat16()(image, text, mask)
    assert half.level_logits.dtype == torch.bfloat16


def test_tokens_begin_small_and_every_parameter_learns() -> None:
    bottleneck = bottleneck_of(tokens=64, text_width=64)
    assert bottleneck.tokens.shape == (1, 64, 64)
    assert bottleneck.tokens.std().item() == pytest.approx(0.02, rel=0.05)
    out = bottleneck(draw(0, 4, 9, 6), draw(1, 4, 3, 64), torch.ones(4, 3))
    concept_loss(out, torch.tensor([0, 1, 2, 3]), torch.tensor([6, 0, 1, 2])).backward()
    for name, parameter in bottleneck.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "changes", [{"projector": "linear"}, {"tokens": 0}, {"pooling": "none"}], ids=str
)
def test_a_bottleneck_without_one_of_its_parts_still_learns(changes: dict[str, Any]) -> None:
    bottleneck = bottleneck_of(**changes)
    again = SafetyBottleneck(BottleneckConfig(**json.loads(json.dumps(asdict(bottleneck.config)))))
    again.load_state_dict(bottleneck.state_dict())
    inputs = draw(0, 4, 9, 6), draw(1, 4, 3, 16), torch.ones(4, 3)
    out = again.eval()(*inputs)
    torch.testing.assert_close(logits(out), logits(bottleneck(*inputs)))
    assert out.attention.shape == (4, 3, 9)
    concept_loss(out, torch.tensor([0, 1, 2, 3]), torch.tensor([6, 0, 1, 2])).backward()
    for name, parameter in again.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert len(probe(again)) == len([p for p in again.parameters() if p.numel()])


def test_without_the_projector_a_position_sees_itself_alone() -> None:
    bottleneck = bottleneck_of(projector="linear")
    image, text, mask = draw(0, 1, 9, 6), draw(1, 1, 3, 16), torch.ones(1, 3)
    changed = image.clone()
    changed[0, 0] += 1.0
    before, after = (bottleneck(one, text, mask).safety_features for one in (image, changed))
    assert not torch.allclose(before[:, 0], after[:, 0])
    torch.testing.assert_close(before[:, 1:], after[:, 1:])
    pooled = bottleneck_of(projector="linear", queries=(1, 1))(image, text, mask).safety_features
    torch.testing.assert_close(pooled, before.mean(1, keepdim=True))


def test_concept_loss_is_the_weighted_sum_of_both_cross_entropies() -> None:
    out = BottleneckOutput(torch.zeros(0), draw(0, 3, 4), draw(1, 3, 7), torch.zeros(0))
    level, type_ = torch.tensor([0, 3, 1]), torch.tensor([6, 2, 0])
    expected = F.cross_entropy(out.level_logits, level) + F.cross_entropy(out.type_logits, type_)
    torch.testing.assert_close(concept_loss(out, level, type_), 10 * expected)
    torch.testing.assert_close(concept_loss(out, level, type_, weight=1.0), expected)
