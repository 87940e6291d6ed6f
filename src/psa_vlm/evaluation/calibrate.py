"""Calibrate a run: make its probabilities honest, and choose thresholds under a stated bound.

What is promised, in these words exactly:

- The risk score of type t is P(type = t) times P(level above safe), both after their temperature.
- A sample is *of type t* if its label is type t at a level above safe; it is *harmless* if its
  label is clean, or safe.
- A *miss* of type t is a sample of type t whose score of type t is below `clean_below` of t.
- A *false refusal* is a harmless sample with a score of any type above its `risky_above`.
- The promise: for each type, P(share of misses among samples of that type <= miss rate) >=
  confidence; and P(share of false refusals among harmless samples <= false-refusal rate) >=
  confidence. P is over draws of the calibration samples: of so many recalibrations, at least so
  many keep the promise. Each holds by itself, not all of them together.

The samples must be independent draws of what the model will meet. The model need not be good: a
weak one keeps the promise by a wide review band, which lies between the two thresholds. Where both
promises leave no room for a band, the lower threshold is taken for both, so that doubt is a risk.

A fifth of the samples sets the temperatures and the rest the thresholds: the bound needs scores
that were fixed before the samples were seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample
from psa_vlm.data.splits import split
from psa_vlm.errors import DataError, InputError, VerdictError
from psa_vlm.evaluation import risk_control
from psa_vlm.evaluation.risk_control import Array, log_softmax
from psa_vlm.evaluation.scorers import calibration as reliability
from psa_vlm.inference import PsaVlm
from psa_vlm.model.calibration import (
    Band,
    Calibration,
    Change,
    Quality,
    ScoreQuantiles,
    Temperatures,
    Thresholds,
)
from psa_vlm.model.probe import probe
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import check_labelled, verdict_text
from psa_vlm.training.runs import fingerprint

METHOD = "temperature scaling; exact binomial (Clopper-Pearson) bound on order statistics"
FIT_SHARE = 0.2
"""The share of the samples that sets the temperatures."""
QUANTILES = 101
BATCH = 64


@dataclass(frozen=True)
class Promise:
    """What the thresholds are to keep; see the module for the words.

    Raises:
        InputError: a number is not between 0 and 1.
    """

    miss_rate: float = 0.01
    false_refusal: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 1:
                words = name.replace("_", " ")
                raise InputError(f"{words} is {value}: give a number between 0 and 1")


@dataclass(frozen=True)
class Readings:
    """What an uncalibrated bottleneck said of n samples, and their labels.

    Attributes:
        types: ``[n, types]`` logits, or logarithms of probabilities, in the taxonomy's order.
        levels: ``[n, levels]`` of the same.
        type_ids, level_ids: ``[n]`` labels.
    """

    types: Array
    levels: Array
    type_ids: np.ndarray
    level_ids: np.ndarray

    def take(self, rows: np.ndarray) -> Readings:
        """Some of the samples, by index."""
        return Readings(*(value[rows] for value in vars(self).values()))

    def divided(self, temperatures: Temperatures) -> Readings:
        """The same with the logits divided by their temperatures."""
        types, levels = self.types / temperatures.type, self.levels / temperatures.level
        return Readings(types, levels, self.type_ids, self.level_ids)

    def scores(self, taxonomy: Taxonomy) -> dict[str, Array]:
        """Risk type -> risk scores ``[n]``."""
        types, levels = np.exp(log_softmax(self.types)), np.exp(log_softmax(self.levels))
        above = levels[:, 1:].sum(1)
        return {name: types[:, taxonomy.type_id(name)] * above for name in taxonomy.risk_types}

    def groups(self, taxonomy: Taxonomy) -> dict[str, np.ndarray]:
        """Who is of which risk type, and who is harmless (under the clean type): ``[n]`` bools."""
        risky = (self.level_ids > 0) & (self.type_ids != taxonomy.type_id(taxonomy.clean))
        groups = {
            name: risky & (self.type_ids == taxonomy.type_id(name)) for name in taxonomy.risk_types
        }
        return groups | {taxonomy.clean: ~risky}


def read(model: PsaVlm, samples: Sequence[Sample], batch: int = BATCH) -> Readings:
    """What a model's bottleneck says of labelled samples, without any calibration it has.

    Raises:
        DataError: a sample has no image, or several, or no labels of this taxonomy.
        VerdictError: a sample could not be assessed.
    """
    check_labelled(samples)
    words = model.taxonomy
    plain = PsaVlm(model.backbone, model.bottleneck, words, model.policy)
    types, levels = [], []
    for start in track(range(0, len(samples), batch), "scoring"):
        part = samples[start : start + batch]
        pictures = [[frame for image in one.images for frame in open_images(image)] for one in part]
        if several := [one.id for one, found in zip(part, pictures, strict=True) if len(found) > 1]:
            raise DataError(f"sample {several[0]}: has several pictures; calibrate on one each")
        texts = [verdict_text(sample) for sample in part]
        for sample, verdict in zip(part, plain.assess_batch(pictures, texts), strict=True):
            if verdict.error is not None:
                raise VerdictError(f"sample {sample.id}: not assessed: {verdict.error}")
            (image,) = verdict.images
            types.append([image.type_probs[name] for name in words.types])
            levels.append([image.level_probs[name] for name in words.levels])
    tiny = np.finfo(np.float64).tiny
    return Readings(
        np.log(np.maximum(types, tiny)),
        np.log(np.maximum(levels, tiny)),
        np.array([words.type_id(sample.type or "") for sample in samples]),
        np.array([words.level_id(sample.level or "") for sample in samples]),
    )


def fit_temperatures(readings: Readings) -> Temperatures:
    """The temperature of each head."""
    return Temperatures(
        type=risk_control.temperature(readings.types, readings.type_ids),
        level=risk_control.temperature(readings.levels, readings.level_ids),
    )


def fit_thresholds(
    readings: Readings, taxonomy: Taxonomy, promise: Promise
) -> dict[str, Thresholds]:
    """The thresholds of each risk type, from readings that set no temperature.

    Raises:
        DataError: a type has too few samples for the bound; says how many each has and needs.
    """
    scores, groups = readings.scores(taxonomy), readings.groups(taxonomy)
    _check_enough({name: int(rows.sum()) for name, rows in groups.items()}, taxonomy, promise)
    worst = np.max([scores[name] for name in taxonomy.risk_types], 0)
    risky_above = risk_control.upper_threshold(
        worst[groups[taxonomy.clean]], promise.false_refusal, promise.confidence
    )
    thresholds = {}
    for name in taxonomy.risk_types:
        clean_below = risk_control.lower_threshold(
            scores[name][groups[name]], promise.miss_rate, promise.confidence
        )
        thresholds[name] = Thresholds(
            clean_below=min(clean_below, risky_above), risky_above=risky_above
        )
    return thresholds


def _group(sample: Sample, taxonomy: Taxonomy) -> str:
    """The risk type that a labelled sample counts for, clean for a harmless one."""
    type_id, level_id = taxonomy.type_id(sample.type or ""), taxonomy.level_id(sample.level or "")
    return taxonomy.types[type_id] if level_id > 0 else taxonomy.clean


def _check_enough(n: Mapping[str, int], taxonomy: Taxonomy, promise: Promise) -> None:
    wanted = dict.fromkeys(
        taxonomy.risk_types, risk_control.needed(promise.miss_rate, promise.confidence)
    ) | {taxonomy.clean: risk_control.needed(promise.false_refusal, promise.confidence)}
    lacking = [
        f"{'harmless' if name == taxonomy.clean else name} has {n[name]} and needs {count}"
        for name, count in wanted.items()
        if n[name] < count
    ]
    if lacking:
        raise DataError(
            f"too few samples for a miss rate of {promise.miss_rate:g} and a false-refusal rate of"
            f" {promise.false_refusal:g} at confidence {promise.confidence:g}:"
            f" {', '.join(lacking)}; that is besides the {FIT_SHARE:.0%} of the samples that set"
            " the temperatures"
        )


def calibrate(
    model: PsaVlm,
    samples: Sequence[Sample],
    promise: Promise | None = None,
    valid_days: int = 90,
    today: date | None = None,
) -> Calibration:
    """Calibrate a model on labelled samples that no training saw; the model itself is unchanged.

    Args:
        samples: of the kind that the model will meet, one picture each.
        promise: what the thresholds are to keep.
        valid_days: how long until it should be done again.
        today: the day it is made on.

    Raises:
        DataError: samples can't be used, or are too few for the promise.
        VerdictError: a sample could not be assessed.
    """
    promise, today, words = promise or Promise(), today or date.today(), model.taxonomy
    check_labelled(samples)
    parts = split(samples, {"fit": FIT_SHARE, "bound": 1 - FIT_SHARE}, seed=0)
    counts = Counter(_group(sample, words) for sample in parts["bound"])
    _check_enough(counts, words, promise)  # before hours are spent on scoring
    fitted, bound = (read(model, parts[name]) for name in ("fit", "bound"))
    temperatures = fit_temperatures(fitted)
    divided = bound.divided(temperatures)
    thresholds = fit_thresholds(divided, words, promise)
    scores, groups = divided.scores(words), divided.groups(words)
    harmless = groups[words.clean]
    grid = np.linspace(0, 1, QUANTILES)
    return Calibration(
        made=today,
        valid_until=today + timedelta(days=valid_days),
        taxonomy=words.hash,
        weights=probe(model.bottleneck),
        data=fingerprint(samples),
        method=METHOD,
        **vars(promise),
        samples={"temperatures": len(parts["fit"]), "thresholds": len(parts["bound"])},
        n={name: int(rows.sum()) for name, rows in groups.items()},
        temperatures=temperatures,
        thresholds=thresholds,
        shares=band_shares(scores, groups, thresholds, words),
        quality={
            "type": _change(bound.types, divided.types, bound.type_ids),
            "level": _change(bound.levels, divided.levels, bound.level_ids),
        },
        scores={
            name: ScoreQuantiles(
                harmless=np.quantile(values[harmless], grid).tolist(),
                risky=np.quantile(values[~harmless], grid).tolist(),
            )
            for name, values in scores.items()
        },
    )


def band_shares(
    scores: dict[str, Array],
    groups: dict[str, np.ndarray],
    thresholds: dict[str, Thresholds],
    taxonomy: Taxonomy,
) -> dict[str, dict[Band, float]]:
    """How many samples of each group fell into each band; groups without samples are left out.

    A sample of a risk type counts for the band of that type, a harmless one for its worst band.
    """
    band = {  # 0 clean, 1 review, 2 risky
        name: (values >= thresholds[name].clean_below).astype(int)
        + (values > thresholds[name].risky_above)
        for name, values in scores.items()
    }
    band[taxonomy.clean] = np.max(list(band.values()), 0)
    return {
        name: {
            "clean": float(np.mean(band[name][rows] == 0)),
            "review": float(np.mean(band[name][rows] == 1)),
            "risky": float(np.mean(band[name][rows] == 2)),
        }
        for name, rows in groups.items()
        if rows.any()
    }


def _change(before: Array, after: Array, labels: np.ndarray) -> Change:
    return Change(before=_quality(before, labels), after=_quality(after, labels))


def _quality(logits: Array, labels: np.ndarray) -> Quality:
    probs = np.exp(log_softmax(logits))
    confidence = np.minimum(probs.max(1), 1.0)
    bins, ece = reliability(confidence.tolist(), (probs.argmax(1) == labels).tolist())
    return Quality(
        nll=max(risk_control.negative_log_likelihood(logits, labels), 0.0),
        ece=ece or 0.0,
        n=[one.n for one in bins],
        confidence=[one.confidence for one in bins],
        accuracy=[one.accuracy for one in bins],
    )
