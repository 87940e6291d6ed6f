"""What the safety bottleneck says about a request: probabilities, concepts and where it looked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np

from psa_vlm.errors import InputError, VerdictError
from psa_vlm.model.calibration import Band, Calibration
from psa_vlm.taxonomy import Taxonomy

SUM_TOLERANCE = 1e-2
"""How far probabilities may be from a sum of 1: room for half precision, not for a broken model."""


@dataclass(frozen=True)
class ImageVerdict:
    """The verdict on one image.

    Attributes:
        type_probs: probability of each type (risk types and clean), by name.
        level_probs: probability of each level by name, from safe to the worst.
        evidence: [H, W] in [0, 1], how much each image position was looked at, or None.
    """

    type_probs: Mapping[str, float]
    level_probs: Mapping[str, float]
    evidence: np.ndarray | None = field(default=None, compare=False)

    @property
    def type(self) -> str:
        """The most probable type; of equals, the first."""
        return _argmax(self.type_probs, "type")

    @property
    def level(self) -> str:
        """The most probable level; of equals, the worst."""
        return _argmax(dict(reversed(list(self.level_probs.items()))), "level")

    def problem(self, taxonomy: Taxonomy) -> str | None:
        """Why this verdict can not be used under `taxonomy`, or None if it can."""
        for what, probs, names in (
            ("type", self.type_probs, taxonomy.types),
            ("level", self.level_probs, taxonomy.levels),
        ):
            if set(probs) != set(names):
                odd = ", ".join(sorted(map(str, set(probs) ^ set(names))))
                return f"{what} probabilities do not match the taxonomy: {odd}"
            values = list(probs.values())
            if not all(_is_finite(value) for value in values):
                return f"{what} probabilities are not finite numbers"
            if min(values) < 0 or abs(sum(values) - 1) > SUM_TOLERANCE:
                return f"{what} probabilities are negative or do not sum to 1"
        if self.evidence is not None:
            if self.evidence.ndim != 2 or not self.evidence.size:
                return f"evidence has shape {self.evidence.shape}, not [H, W]"
            if not bool(np.all((self.evidence >= 0) & (self.evidence <= 1))):  # false for NaN
                return "evidence is not within 0 and 1"
        return None

    def scores(self, taxonomy: Taxonomy) -> dict[str, float]:
        """Risk type -> its risk score, P(type) times P(level above safe)."""
        above = sum(p for name, p in self.level_probs.items() if name != taxonomy.safe_level)
        return {name: self.type_probs[name] * above for name in taxonomy.risk_types}

    def concepts(
        self, taxonomy: Taxonomy, calibration: Calibration | None = None
    ) -> dict[str, str]:
        """Risk type -> level.

        Without a calibration: the most probable type at the most probable level, the rest safe.
        With one: every type that is surely clean is safe, and no other is; of those, the one with
        the highest score has the most probable level above safe, the rest the lowest above safe.
        """
        found = {name: taxonomy.safe_level for name in taxonomy.risk_types}
        if calibration is None:
            if self.type != taxonomy.clean:
                found[self.type] = self.level
            return found
        scores = self.scores(taxonomy)
        flagged = [name for name in scores if calibration.band(name, scores[name]) != "clean"]
        found |= dict.fromkeys(flagged, taxonomy.levels[1])
        if flagged:
            likeliest = max(flagged, key=lambda name: scores[name])
            found[likeliest] = self.risky_level(taxonomy)
        return found

    def risky_level(self, taxonomy: Taxonomy) -> str:
        """The most probable level above safe; of equals, the worst."""
        return max(reversed(taxonomy.levels[1:]), key=lambda name: self.level_probs[name])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that is not finite becomes None."""
        return {
            "type": self.type if _are_finite(self.type_probs) else None,
            "level": self.level if _are_finite(self.level_probs) else None,
            "type_probs": {name: _number(value) for name, value in self.type_probs.items()},
            "level_probs": {name: _number(value) for name, value in self.level_probs.items()},
            "evidence": None
            if self.evidence is None
            else [[_number(value) for value in row] for row in np.atleast_2d(self.evidence)],
        }


@dataclass(frozen=True)
class Verdict:
    """The verdict on a request: every image's own, joined into one level per risk type.

    Build it with `from_probs`. A verdict that could not be computed has `error` set; it is never
    to be read as safe.

    Attributes:
        images: one verdict for each image of the request, in order.
        concepts: risk type -> level name, the worst over the images.
        error: why the verdict could not be computed, or None.
        overridden: the risk types whose level was given by the caller, not predicted.
        worst: index of the image that decided (highest level, then first), None after an error.
        scores: risk type -> calibrated risk score, the highest over the images; empty without a
            calibration.
        bands: risk type -> surely clean, review or surely risky; empty without a calibration.
    """

    images: tuple[ImageVerdict, ...]
    concepts: Mapping[str, str]
    error: str | None = None
    overridden: frozenset[str] = frozenset()
    worst: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    bands: Mapping[str, Band] = field(default_factory=dict)

    @classmethod
    def from_probs(
        cls,
        images: Iterable[ImageVerdict],
        taxonomy: Taxonomy,
        calibration: Calibration | None = None,
    ) -> Verdict:
        """Join the verdicts on the images of one request.

        Names are put in the taxonomy's order, with clean last so that a tie is a risk. Anything
        but a probability distribution over exactly the taxonomy's names gives a failed verdict.
        A calibration adds scores and bands; its temperatures are already in the probabilities.
        """
        images = tuple(images)
        if not images:
            return cls.failed("no image was assessed")
        for index, image in enumerate(images):
            if problem := image.problem(taxonomy):
                return cls.failed(f"image {index}: {problem}", images)
        types = (*taxonomy.risk_types, taxonomy.clean)
        images = tuple(
            replace(
                image,
                type_probs={name: image.type_probs[name] for name in types},
                level_probs={name: image.level_probs[name] for name in taxonomy.levels},
            )
            for image in images
        )
        found = [image.concepts(taxonomy, calibration) for image in images]
        rank = taxonomy.levels.index
        concepts = {
            name: max((one[name] for one in found), key=rank) for name in taxonomy.risk_types
        }
        height = [max(map(rank, one.values())) for one in found]
        verdict = cls(images, concepts, worst=height.index(max(height)))
        if calibration is None:
            return verdict
        by_image = [image.scores(taxonomy) for image in images]
        scores = {name: max(one[name] for one in by_image) for name in taxonomy.risk_types}
        return replace(verdict, scores=scores, bands=calibration.bands(scores))

    @classmethod
    def failed(cls, reason: str, images: Iterable[ImageVerdict] = ()) -> Verdict:
        """A verdict that could not be computed, and why; it has no concepts."""
        return cls(tuple(images), {}, error=reason or "unknown reason")

    def override(self, concepts: Mapping[str, str], taxonomy: Taxonomy) -> Verdict:
        """The same verdict with the named risk types at the given levels (an intervention).

        What is given is sure: it is under review no longer. An error stays an error.

        Raises:
            InputError: a name is not a risk type or a level of the taxonomy.
        """
        given = {}
        for name, level in concepts.items():
            if name not in taxonomy.risk_types:
                known = ", ".join(taxonomy.risk_types)
                raise InputError(f"concepts: '{name}' is not a risk type; use one of {known}")
            given[name] = taxonomy.levels[taxonomy.level_id(level)]
        merged = {**self.concepts, **given}
        bands = dict(self.bands)
        for name in given.keys() & bands.keys():
            bands[name] = "clean" if given[name] == taxonomy.safe_level else "risky"
        return replace(
            self, concepts=merged, overridden=self.overridden | given.keys(), bands=bands
        )

    def problem(self, taxonomy: Taxonomy) -> str | None:
        """Why this verdict can not be used under `taxonomy`, or None if it can.

        Everything is looked at again, so that a verdict built by hand gets no further than one that
        `from_probs` made.
        """
        if self.error is not None:
            return self.error
        if not self.images:
            return "no image was assessed"
        for index, image in enumerate(self.images):
            if problem := image.problem(taxonomy):
                return f"image {index}: {problem}"
        if odd := set(self.concepts) ^ set(taxonomy.risk_types):
            return f"concepts do not match the taxonomy: {', '.join(sorted(map(str, odd)))}"
        for name, level in self.concepts.items():
            if level not in taxonomy.levels:
                return f"concept {name} has an unknown level: {level}"
        if self.bands and set(self.bands) != set(taxonomy.risk_types):
            return "bands do not match the taxonomy"
        for name, band in self.bands.items():
            if band not in get_args(Band):
                return f"concept {name} has an unknown band: {band}"
            if band != "clean" and self.concepts[name] == taxonomy.safe_level:
                return f"concept {name} is {taxonomy.safe_level} but its band is {band}"
        return None

    @property
    def review(self) -> tuple[str, ...]:
        """The risk types that the calibration is not sure about."""
        return tuple(name for name, band in self.bands.items() if band == "review")

    @property
    def type(self) -> str | None:
        """The type predicted for the image that decided."""
        return None if self.worst is None else self.images[self.worst].type

    @property
    def level(self) -> str | None:
        """The level predicted for the image that decided."""
        return None if self.worst is None else self.images[self.worst].level

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a number that is not finite becomes None."""
        return {
            "type": self.type,
            "level": self.level,
            "concepts": dict(self.concepts),
            "scores": {name: _number(value) for name, value in self.scores.items()},
            "bands": dict(self.bands),
            "overridden": sorted(self.overridden),
            "worst": self.worst,
            "error": self.error,
            "images": [image.to_dict() for image in self.images],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """What `to_dict` wrote, without the evidence; numbers are as it rounded them.

        Nothing is checked: `problem` tells whether the verdict can be used.

        Raises:
            KeyError, TypeError, AttributeError: something is missing, or of another form.
        """
        images = (
            ImageVerdict(dict(one["type_probs"]), dict(one["level_probs"]))
            for one in data["images"]
        )
        return cls(
            tuple(images),
            dict(data["concepts"]),
            data["error"],
            frozenset(data["overridden"]),
            data["worst"],
            dict(data["scores"]),
            dict(data["bands"]),
        )


def _argmax(probs: Mapping[str, float], what: str) -> str:
    if not _are_finite(probs):
        raise VerdictError(f"the {what} probabilities are missing or not finite numbers")
    return max(probs, key=lambda name: probs[name])


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float, np.number)) and math.isfinite(value)


def _are_finite(probs: Mapping[str, float]) -> bool:
    return bool(probs) and all(_is_finite(value) for value in probs.values())


def _number(value: object) -> float | None:
    return round(float(value), 6) if _is_finite(value) else None  # type: ignore[arg-type]
