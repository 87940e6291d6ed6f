"""Calibrated verdicts: temperatures, and thresholds that come with a stated bound.

A calibration belongs to one bottleneck and lies beside its weights as `calibration.json`. What its
numbers promise is written down in `psa_vlm.evaluation.calibrate`, which makes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from psa_vlm.errors import CheckpointError
from psa_vlm.model.probe import probe
from psa_vlm.taxonomy import Taxonomy

FILE = "calibration.json"
"""Its name in a run folder."""

Band = Literal["clean", "review", "risky"]
"""Surely clean, not sure, surely risky."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Temperatures(_Part):
    """What the logits of each head are divided by."""

    type: Positive = 1.0
    level: Positive = 1.0


class Thresholds(_Part):
    """Of one risk type's score: surely clean below the first, surely risky above the second."""

    clean_below: Share
    risky_above: Share

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.clean_below > self.risky_above:
            raise ValueError(f"clean_below is {self.clean_below}, above risky_above")
        return self


class Quality(_Part):
    """How far one head's probabilities can be trusted, on the samples behind the thresholds.

    `n`, `confidence` and `accuracy` are its reliability diagram: equal-width bins of the
    probability of the predicted name; null in an empty bin.
    """

    nll: float = Field(ge=0, allow_inf_nan=False)
    ece: Share
    n: list[int]
    confidence: list[Share | None]
    accuracy: list[Share | None]


class Change(_Part):
    """The same before and after the temperature."""

    before: Quality
    after: Quality


class ScoreQuantiles(_Part):
    """How one risk type's scores were spread: evenly spaced quantiles, the least first."""

    harmless: list[Share] = Field(min_length=2)
    risky: list[Share] = Field(min_length=2)


class Calibration(_Part):
    """Temperatures and thresholds of one bottleneck, and what they rest on.

    Attributes:
        made, valid_until: days.
        taxonomy: hash of the taxonomy.
        weights: probe of the bottleneck.
        data: fingerprint of the calibration samples.
        method: how the thresholds were chosen.
        miss_rate, false_refusal, confidence: what is promised.
        samples: how many the temperatures, and how many the thresholds were taken from.
        n: of the latter, the risky ones of each type; under the clean type all harmless ones.
        temperatures: of both heads.
        thresholds: of each risk type.
        shares: of the same groups as `n`, how many fell into each band; a harmless sample counts
            for the worst band of any type.
        quality: of the type head and the level head.
        scores: of each risk type, over the harmless samples and over all risky ones.
    """

    format: Literal[1] = 1
    made: date
    valid_until: date
    taxonomy: str
    weights: list[float | None]
    data: str
    method: str
    miss_rate: Share
    false_refusal: Share
    confidence: Share
    samples: dict[Literal["temperatures", "thresholds"], int]
    n: dict[str, int]
    temperatures: Temperatures
    thresholds: dict[str, Thresholds]
    shares: dict[str, dict[Band, Share]]
    quality: dict[Literal["type", "level"], Change]
    scores: dict[str, ScoreQuantiles]

    def band(self, name: str, score: float) -> Band:
        """How sure a risk type's score is; a score that is no number is risky."""
        limits = self.thresholds[name]
        if score < limits.clean_below:
            return "clean"
        return "review" if score <= limits.risky_above else "risky"

    def bands(self, scores: Mapping[str, float]) -> dict[str, Band]:
        """`band` of every score."""
        return {name: self.band(name, score) for name, score in scores.items()}

    def check(self, taxonomy: Taxonomy, bottleneck: nn.Module) -> None:
        """Make sure that the calibration was made for these words and these weights.

        Raises:
            TaxonomyMismatch: it speaks another taxonomy.
            CheckpointError: it was made for other weights, or lacks a risk type.
        """
        taxonomy.check_same(self.taxonomy, FILE)
        if self.weights != probe(bottleneck):
            raise CheckpointError(
                f"{FILE}: was made for a bottleneck with other weights; run psa-vlm calibrate"
                " again, or delete the file to go without"
            )
        for what, found in (("thresholds", self.thresholds), ("scores", self.scores)):
            if set(found) != set(taxonomy.risk_types):
                known = ", ".join(taxonomy.risk_types)
                raise CheckpointError(f"{FILE}: {what} must be given for exactly {known}")

    def to_json(self) -> str:
        """What the file holds."""
        return self.model_dump_json(indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file in one piece.

        Raises:
            CheckpointError: it can't be written; what stood there is untouched.
        """
        path = Path(path)
        writing = path.with_name(f"{path.name}.writing")
        try:
            with writing.open("w", encoding="utf-8") as stream:
                stream.write(self.to_json())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(writing, path)
        except OSError as error:
            writing.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: can't be written ({error.strerror})") from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file can't be read or is damaged.
        """
        try:
            return cls.model_validate_json(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: can't be read ({error})") from error
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise CheckpointError(
                f"{path}: damaged or of another version: {key}: {first['msg']}; run psa-vlm"
                " calibrate again, or delete the file to go without"
            ) from None
