"""The safety head."""

from __future__ import annotations

import torch
from torch import Tensor

from psa_vlm.model.head import Pooling, SafetyHead


def head_of(pooling: Pooling) -> SafetyHead:
    torch.manual_seed(0)
    head = SafetyHead(width=16, heads=4, levels=4, types=7, pooling=pooling).eval()
    if head.reader is not None:
        torch.nn.init.normal_(head.reader.score.weight)
    return head


def inputs(batch: int = 2, text: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    h_t = torch.randn(batch, text, 16, generator=generator)
    tokens = torch.randn(1, 3, 16, generator=generator)
    h_s = torch.randn(batch, 6, 16, generator=generator)
    return h_t, torch.ones(batch, text), tokens, h_s


def attend(head: SafetyHead, h_t: Tensor, tokens: Tensor, h_s: Tensor) -> tuple[Tensor, Tensor]:
    """Attended vectors and weights, tokens (1) included, of a head that pools over the text."""
    assert head.reader is not None
    keys = head.reader.image_norm(torch.cat([tokens.expand(len(h_t), -1, -1), h_s], dim=1))
    attended: tuple[Tensor, Tensor] = head.attention(head.reader.text_norm(h_t), keys, keys)
    return attended


def test_first_reads_the_first_position_and_ignores_the_mask() -> None:
    head = head_of("first")
    h_t, mask, tokens, h_s = inputs()
    level, type_, _ = head(h_t, mask, tokens, h_s)
    changed = torch.cat([h_t[:, :1], torch.randn_like(h_t[:, 1:])], dim=1)
    again = head(changed, torch.zeros_like(mask), tokens, h_s)
    torch.testing.assert_close((level, type_), again[:2])


def test_text_reads_every_real_position() -> None:
    head = head_of("text")
    h_t, mask, tokens, h_s = inputs()
    level, _, _ = head(h_t, mask, tokens, h_s)
    for position in range(h_t.shape[1]):
        changed = h_t.clone()
        changed[:, position] *= -1.0
        assert not torch.allclose(head(changed, mask, tokens, h_s)[0], level, atol=1e-4)


def test_order_of_the_text_and_of_the_image_does_not_matter_to_text_pooling() -> None:
    head = head_of("text")
    h_t, mask, tokens, h_s = inputs()
    expected = head(h_t, mask, tokens, h_s)
    got = head(h_t.flip(1), mask, tokens, h_s.flip(1))
    torch.testing.assert_close(got[:2], expected[:2])
    torch.testing.assert_close(got[2], expected[2].flip(1).flip(2))


def test_none_reads_the_image_alone() -> None:
    head = head_of("none")
    h_t, mask, tokens, h_s = inputs()
    level, type_, attention = head(h_t, mask, tokens, h_s)
    again = head(torch.randn_like(h_t), mask, tokens, h_s)
    torch.testing.assert_close((level, type_), again[:2])
    torch.testing.assert_close(level[:1], head.to_level(torch.cat([tokens, h_s[:1]], 1).mean(1)))
    assert not torch.allclose(head(h_t, mask, tokens, -h_s)[0], level)
    torch.testing.assert_close(attention, torch.full((2, 5, 6), 1 / 9))


def test_padding_may_hold_anything() -> None:
    head = head_of("text")
    h_t, mask, tokens, h_s = inputs()
    mask[0, 3:] = 0
    expected = head(h_t, mask, tokens, h_s)
    h_t[0, 3:] = float("nan")
    got = head(h_t, mask, tokens, h_s)
    torch.testing.assert_close(got, expected)
    assert (got[2][0, 3:] == 0).all()


def test_a_text_without_a_real_position_has_no_verdict() -> None:
    head = head_of("text")
    h_t, mask, tokens, h_s = inputs()
    mask[1] = 0
    level, type_, _ = head(h_t, mask, tokens, h_s)
    assert level[1].isnan().all() and type_[1].isnan().all()
    assert level[0].isfinite().all()


def test_attention_goes_from_text_to_image_positions() -> None:
    head = head_of("text")
    h_t, mask, tokens, h_s = inputs()
    attention = head(h_t, mask, tokens, h_s)[2]
    assert attention.shape == (2, 5, 6)
    whole = attend(head, h_t, tokens, h_s)[1]
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 5))
    torch.testing.assert_close(attention, whole[..., 3:])


def test_text_pooling_starts_as_the_mean() -> None:
    torch.manual_seed(0)
    head = SafetyHead(width=16, heads=4, levels=4, types=7, pooling="text").eval()
    h_t, mask, tokens, h_s = inputs()
    assert head.reader is not None
    read = head.reader.text_norm(h_t) + attend(head, h_t, tokens, h_s)[0]
    mean = (read + head.reader.mlp(read)).mean(1)
    torch.testing.assert_close(head(h_t, mask, tokens, h_s)[0], head.to_level(mean))
