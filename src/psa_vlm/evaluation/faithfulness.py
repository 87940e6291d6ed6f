"""Are explanations true? Evidence maps under deletion and insertion, pointing, and interventions.

Deletion takes the most important parts of an image away first, insertion shows them first (Petsiuk
et al. 2018, arXiv:1806.07421); what is watched is the risk score of the type that was seen.
Pointing asks whether the highest evidence lies on the thing that carries the risk (Zhang et al.
2016, arXiv:1608.00507). An intervention overrides a wrong concept by the right one (Koh et al.
2020, arXiv:2007.04612).

Shape letters: B images, S x T what the model sees of each, H x W the grid of their features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError, InputError
from psa_vlm.evaluation.scorers import Interval, Judge, wilson
from psa_vlm.inference import PsaVlm
from psa_vlm.model.verdict import Verdict
from psa_vlm.progress import track

BOX = "box"
"""Tag of a sample: where the thing is that carries the risk, "left top right bottom" in pixels."""
MAPS = ("evidence", "gradient", "random")
"""What orders the parts of an image: the verdict's evidence, and what it has to beat."""
FRACTIONS = tuple(i / 10 for i in range(11))
"""Shares of an image's parts that are taken away or shown."""
BATCH = 32
DRAWS = 1000

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Faithfulness:
    """How true the evidence maps are.

    Attributes:
        deletion, insertion: map -> mean score at each of `FRACTIONS`.
        deletion_area, insertion_area: map -> mean area under the curve; of deletion the lower, of
            insertion the higher is the better map.
        gains: "deletion over random" and so on: by how much the evidence's area is better, image by
            image; above 0 in its whole interval, the evidence is better than that map.
        pointing: map -> share of images whose highest value lies on the thing; empty without boxes.
        n: images, all of them risky and seen as such.
    """

    deletion: dict[str, list[float]]
    insertion: dict[str, list[float]]
    deletion_area: dict[str, Interval]
    insertion_area: dict[str, Interval]
    gains: dict[str, Interval]
    pointing: dict[str, Interval]
    n: int

    def table(self) -> Table:
        """One line for each map."""
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("map", "deletion area (low)", "insertion area (high)", "pointing"):
            shown.add_column(column, justify="left" if column == "map" else "right")
        for name in MAPS:
            areas = (self.deletion_area[name], self.insertion_area[name])
            shown.add_row(name, *map(_told, areas), _told(self.pointing.get(name)))
        gains = (f"{name}: {_told(gain)}" for name, gain in self.gains.items())
        shown.caption = "\n".join(["better by (95% interval):", *gains, f"n: {self.n}"])
        shown.caption_justify = "left"
        return shown


@dataclass(frozen=True)
class Interventions:
    """What it helps to override wrong concepts by the right ones.

    A reply is as it should be if it refuses exactly where the sample's own answer does.

    Attributes:
        repaired: of replies that were wrong beside a wrong concept, the share that became right.
        spoiled: of replies that were right beside a wrong concept, the share that became wrong.
        wrong: share of requests with a wrong concept.
    """

    repaired: Interval | None
    spoiled: Interval | None
    wrong: Interval

    def table(self) -> Table:
        """One line for each share."""
        shown = Table("of requests", "share", "n", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, one in (
            ("concept wrong", self.wrong),
            ("concept and reply wrong: repaired by the right concept", self.repaired),
            ("concept wrong, reply right: spoiled by the right concept", self.spoiled),
        ):
            shown.add_row(name, _told(one), "0" if one is None else str(one.n))
        return shown


def explain(model: PsaVlm, samples: Sequence[Sample], seed: int = 0) -> Faithfulness:
    """Test evidence maps on the risky samples that are seen as risky, one image each.

    Args:
        model: the run.
        samples: labelled; the tag `BOX`, where there is one, is pointed at.
        seed: of the random maps.

    Raises:
        DataError: no sample is risky and seen as such.
        InputError: the processor makes more than one picture of an image.
    """
    rng = np.random.default_rng(seed)
    curves: dict[tuple[str, str], list[list[float]]] = {}
    hits: dict[str, list[bool]] = {name: [] for name in MAPS}
    count = 0
    for sample in track(_seen_as_risky(model, samples), "explanations"):
        count += 1
        scene = _Scene(model, sample)
        maps: dict[str, Array] = {"evidence": scene.evidence, "gradient": scene.gradient()}
        maps["random"] = rng.random(size=(*scene.evidence.shape,))
        for name in MAPS:
            order: list[int] = np.argsort(-maps[name], axis=None, kind="stable").tolist()
            for kind in ("deletion", "insertion"):
                curves.setdefault((kind, name), []).append(scene.curve(order, kind == "insertion"))
            if BOX in sample.tags:
                hits[name].append(scene.on_thing(order[0]))
    if not count:
        raise DataError("no sample is risky and seen as risky: there is no evidence to test")
    areas = {key: [float(np.mean(curve)) for curve in found] for key, found in curves.items()}
    gains = {}
    for kind, sign in (("deletion", -1), ("insertion", 1)):
        for other in MAPS[1:]:
            pairs = zip(areas[kind, "evidence"], areas[kind, other], strict=True)
            gains[f"{kind} over {other}"] = _mean([sign * (ours - its) for ours, its in pairs])
    return Faithfulness(
        {name: np.mean(curves["deletion", name], axis=0).tolist() for name in MAPS},
        {name: np.mean(curves["insertion", name], axis=0).tolist() for name in MAPS},
        {name: _mean(areas["deletion", name]) for name in MAPS},
        {name: _mean(areas["insertion", name]) for name in MAPS},
        gains,
        {name: share for name in MAPS if (share := wilson(hits[name]))},
        count,
    )


def intervene(model: PsaVlm, samples: Sequence[Sample], max_new_tokens: int = 40) -> Interventions:
    """Override wrong concepts by the right ones, and see what becomes of the replies.

    Args:
        model: the run.
        samples: with image, labels and answer.
        max_new_tokens: most tokens of a reply.

    Raises:
        DataError: no sample has all of these.
    """
    usable = [one for one in samples if one.images and one.type and one.level and one.answer]
    if not usable:
        raise DataError("no sample has an image, a type, a level and an answer")
    judge, words = Judge.for_policy(model.policy, model.taxonomy), model.taxonomy

    def right(sample: Sample) -> Mapping[str, str]:
        found = dict.fromkeys(words.risk_types, words.safe_level)
        if sample.type != words.clean:
            found[str(sample.type)] = str(sample.level)
        return found

    def ask(part: Sequence[Sample], concepts: Mapping[str, str] | None) -> list[Any]:
        images, texts = [one.images for one in part], [one.question for one in part]
        return model.reply_batch(images, texts, concepts=concepts, max_new_tokens=max_new_tokens)

    def good(sample: Sample, reply: Any) -> bool:
        return judge.is_refusal(reply.text) == judge.is_refusal(sample.answer or "")

    wrong: list[tuple[Sample, bool]] = []
    for start in track(range(0, len(usable), BATCH), "replies"):
        part = usable[start : start + BATCH]
        for sample, reply in zip(part, ask(part, None), strict=True):
            if reply.verdict is None or dict(reply.verdict.concepts) != right(sample):
                wrong.append((sample, good(sample, reply)))
    repaired, spoiled = [], []
    for sample, was_good in track(wrong, "interventions"):
        (reply,) = ask([sample], right(sample))
        if was_good:
            spoiled.append(not good(sample, reply))
        else:
            repaired.append(good(sample, reply))
    share = wilson([True] * len(wrong) + [False] * (len(usable) - len(wrong)))
    assert share is not None  # there is a usable sample
    return Interventions(wilson(repaired), wilson(spoiled), share)


class _Scene:
    """One image as the model sees it, of which parts can be taken away."""

    def __init__(self, model: PsaVlm, sample: Sample) -> None:
        self.model = model
        (picture,) = [frame for image in sample.images for frame in open_images(image)]
        self._inputs, self._marks = model.backbone.process([picture])
        self.pixels: Tensor = self._inputs["pixel_values"]  # [1, 3, S, T]
        if self.pixels.ndim != 4 or len(self.pixels) != 1:
            raise InputError("the processor makes several pictures of an image: none can be masked")
        begin = model.bottleneck.config.begin
        self._text = model.backbone.embed_text([sample.question], begin)
        (verdict,) = self.verdicts(self.pixels)
        evidence = verdict.images[0].evidence
        assert evidence is not None  # the model's own verdicts have it
        self.evidence: Array = evidence.astype(np.float64)
        self.type = str(verdict.type)
        self.box = sample.tags.get(BOX)
        self.size = picture.size

    def verdicts(self, pixels: Tensor) -> list[Verdict]:
        """Of variants of the image ``[B, 3, S, T]``."""
        with torch.no_grad():
            output, maps = self._read(pixels)
        return self.model.verdicts(output, maps)

    def _read(self, pixels: Tensor) -> tuple[Any, Sequence[Tensor]]:
        count = len(pixels)
        inputs = {
            name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self._inputs.items()
        }
        inputs["pixel_values"] = pixels
        features = self.model.backbone.encode_inputs(inputs, self._marks * count)
        h_t, mask = (tensor.expand(count, *tensor.shape[1:]) for tensor in self._text)
        return self.model.bottleneck.read(features.maps, h_t, mask), features.maps

    def scores(self, pixels: Tensor) -> list[float]:
        """Risk score, in each variant, of the type that was seen in the whole image."""
        words = self.model.taxonomy
        return [one.images[0].scores(words)[self.type] for one in self.verdicts(pixels)]

    def gradient(self) -> Array:
        """How strongly each part ``[H, W]`` moves the odds of the type and of a risky level."""
        words = self.model.taxonomy
        with torch.enable_grad():
            pixels = self.pixels.detach().clone().requires_grad_()
            output, _ = self._read(pixels)
            type_, safe = words.type_id(self.type), words.level_id(words.safe_level)
            odds = output.type_logits.log_softmax(1)[0, type_]
            odds = odds - output.level_logits.log_softmax(1)[0, safe]
            (moved,) = torch.autograd.grad(odds, pixels)
        strength = moved.abs().sum(1, keepdim=True)  # [1, 1, S, T]
        grid = (self.evidence.shape[0], self.evidence.shape[1])
        pooled: Array = F.adaptive_avg_pool2d(strength.float(), grid)[0, 0].double().cpu().numpy()
        return pooled

    def curve(self, order: Sequence[int], insertion: bool) -> list[float]:
        """Scores at each of `FRACTIONS`, with parts taken away (or shown) in this order.

        What is away has the image's mean colour.
        """
        cells = self.evidence.size
        shown = torch.full((len(FRACTIONS), cells), not insertion)
        for row, fraction in enumerate(FRACTIONS):
            shown[row, list(order[: round(fraction * cells)])] = insertion
        grid = shown.view(-1, 1, *self.evidence.shape).float()
        mask = F.interpolate(grid, self.pixels.shape[-2:], mode="nearest-exact").bool()
        mean = self.pixels.mean((2, 3), keepdim=True)
        return self.scores(torch.where(mask.to(self.pixels.device), self.pixels, mean))

    def on_thing(self, cell: int) -> bool:
        """Whether the middle of a part lies in the box, which is of the whole image."""
        left, top, right, bottom = map(float, str(self.box).split())
        rows, columns = map(int, self.evidence.shape)
        y = (cell // columns + 0.5) / rows * self.size[1]
        x = (cell % columns + 0.5) / columns * self.size[0]
        return left <= x <= right and top <= y <= bottom


def _seen_as_risky(model: PsaVlm, samples: Sequence[Sample]) -> list[Sample]:
    words = model.taxonomy
    risky = [
        one
        for one in samples
        if len(one.images) == 1 and one.level not in (None, words.safe_level) and one.type
    ]
    found = []
    for start in range(0, len(risky), BATCH):
        part = risky[start : start + BATCH]
        verdicts = model.assess_batch([one.images for one in part], [one.question for one in part])
        found += [
            one
            for one, verdict in zip(part, verdicts, strict=True)
            if len(verdict.images) == 1
            and verdict.type == one.type != words.clean
            and verdict.level != words.safe_level
        ]
    return found


def _mean(values: Sequence[float]) -> Interval:
    """The mean with a seeded bootstrap interval."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (DRAWS, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(np.mean(values))
    return Interval(value, min(float(low), value), max(float(high), value), len(values))


def _told(one: Interval | None) -> str:
    return "-" if one is None else f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"
