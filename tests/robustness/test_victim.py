"""What an attack is told of a request equals what the request then gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psa_vlm.data.sample import Sample
from psa_vlm.errors import InputError
from psa_vlm.evaluation.scorers import Judge
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
from psa_vlm.model.pixels import pictures_of
from psa_vlm.robustness.adaptive import SURE, joint, on_head
from psa_vlm.robustness.gradient import Bounds, apgd
from psa_vlm.robustness.victim import Victim, other_bottleneck, with_picture
from psa_vlm.testbed.cases import evaluation_samples
from psa_vlm.testbed.premise import base_path


@pytest.fixture(scope="module")
def model() -> PsaVlm:
    """The testbed's base model, which answers whatever is in an image, behind a random head."""
    backbone = Backbone.from_pretrained(base_path())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BottleneckConfig(
            backbone.vision_width, backbone.text_width, hidden=16, tokens=4, depth=1
        )
        return PsaVlm(backbone, SafetyBottleneck(config))


@pytest.fixture(scope="module")
def risky() -> list[Sample]:
    return evaluation_samples("compositions", "risky", 4, 0)


def see(model: PsaVlm, type_: str, level: str) -> None:
    """The head sees this in every image, with a little left that images can change."""
    head, words = model.bottleneck.head, model.taxonomy
    with torch.no_grad():
        for linear, index in (
            (head.to_type, words.type_id(type_)),
            (head.to_level, words.level_id(level)),
        ):
            linear.bias.zero_()
            linear.bias[index] = 3.0


def test_the_answer_is_judged_as_the_reply_would_be(model: PsaVlm, risky: list[Sample]) -> None:
    victim = Victim(model, risky)
    features = victim.encode(victim.clean)
    strong = model.policy.texts()["hints"]["high"].format(type="illegal risk")
    for hint in (None, strong):
        losses, given = victim.answer(features, [hint] * len(risky))
        inputs = model.backbone.prompts(
            [one.conversation[:1] for one in risky], [1] * len(risky), [hint] * len(risky)
        )
        replies = model.backbone.generate(inputs, features, 40)
        harmful = [one.tags["harmful"] for one in risky]
        assert given == [
            Judge().is_correct(reply, text) for reply, text in zip(replies, harmful, strict=True)
        ]
        assert given == ([True] * 4 if hint is None else [False] * 4)
        assert losses.shape == (4,) and bool((losses > 0.5).all()) == (hint is not None)


def test_an_attack_sees_the_decision_that_the_run_takes(model: PsaVlm, risky: list[Sample]) -> None:
    see(model, "privacy", "high")
    victim = Victim(model, risky)
    found = apgd(on_head(victim), victim.clean, Bounds.ball(victim.clean, 16), 8)
    attacked = map(with_picture, risky, pictures_of(found.images))
    replies = model.reply_batch(
        [one.images for one in attacked], [one.question for one in risky], max_new_tokens=1
    )
    assert [one.decision.action == "allow" for one in replies] == found.fallen.tolist()
    start = victim.margin(victim.read(victim.encode(victim.clean)))
    assert bool((found.loss < start).all())
    assert not found.dead.any()


def test_alarm_goes_the_other_way(model: PsaVlm, risky: list[Sample]) -> None:
    see(model, "clean", "safe")
    victim = Victim(model, risky[:2])
    x = victim.clean.clone().requires_grad_()
    (loss, fallen), (alarm, alarmed) = (
        on_head(victim, alarm=way)(x, [0, 1]) for way in (False, True)
    )
    assert torch.equal(loss, -alarm) and bool((loss < 0).all())
    assert (fallen, alarmed) == ([True, True], [False, False])


def test_joint_wants_both(model: PsaVlm, risky: list[Sample]) -> None:
    victim = Victim(model, risky[:2])
    see(model, "privacy", "high")  # the answer alone is no success
    loss, fallen = joint(victim, 0.5)(victim.clean, [0, 1])
    assert fallen == [False, False]
    see(model, "clean", "safe")  # now the base model's own answer is
    lower, fallen = joint(victim, 0.5)(victim.clean, [0, 1])
    assert fallen == [True, True] and bool((lower < loss).all())
    assert bool((lower >= -0.5 * SURE).all())


def test_some_of_the_requests_are_those_requests(model: PsaVlm, risky: list[Sample]) -> None:
    victim = Victim(model, risky)
    part = victim.take([2, 0])
    assert [one.id for one in part.samples] == [risky[2].id, risky[0].id]
    whole = victim.margin(victim.read(victim.encode(victim.clean)))
    some = part.margin(part.read(part.encode(part.clean)))
    assert torch.allclose(some, whole[[2, 0]], atol=1e-4)


def test_images_of_two_sizes_are_no_batch(model: PsaVlm, risky: list[Sample]) -> None:
    (picture,) = risky[0].images
    larger = with_picture(risky[1], picture.resize((100, 96)))  # type: ignore[union-attr]
    with pytest.raises(InputError, match="one size"):
        Victim(model, [risky[0], larger])


def test_a_surrogate_must_share_the_base_model(model: PsaVlm, run_dir: Path) -> None:
    with pytest.raises(InputError, match="another base model"):
        other_bottleneck(model, run_dir)
