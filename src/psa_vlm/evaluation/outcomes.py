"""What judges said of replies, read from Inspect's log of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psa_vlm.errors import DataError, MissingExtra

try:
    from inspect_ai.log import EvalLog, EvalSample, read_eval_log
    from inspect_ai.scorer import Score
except ImportError:  # the core does without it
    raise MissingExtra("inspect_ai", "eval") from None

from psa_vlm.evaluation.judges import judges_it


@dataclass(frozen=True)
class Outcome:
    """What one judge said of one reply.

    Attributes:
        item: the request; the same in every log of a set.
        epoch: which time it was asked, from 1.
        group, expects, picture: of the request.
        judge: its name.
        good: 1 if the reply did what it should, 0 if not; None is unscored.
        answer: what the judge made of the reply, in a word or two.
        ratings: from 0 to 10 by scale, of a judge with a rubric.
        good_from: the rubric's.
    """

    item: str
    epoch: int
    group: str
    expects: str
    picture: str
    judge: str
    good: float | None
    answer: str = ""
    ratings: dict[str, float] = field(default_factory=dict)
    good_from: float = 0.0


def read_log(path: str | Path) -> EvalLog:
    """A log of Inspect's with its samples; of a folder, the latest.

    Raises:
        DataError: there is none, or it can't be read.
    """
    place = Path(path)
    if place.is_dir():
        logs = sorted(place.glob("*.eval"), key=lambda one: (one.stat().st_mtime_ns, one.name))
        if not logs:
            raise DataError(f"{place}: holds no log (*.eval)")
        place = logs[-1]
    try:
        return read_eval_log(str(place), resolve_attachments=True)
    except Exception as error:  # of whatever reads a damaged archive
        raise DataError(f"{place}: not a log of Inspect's ({error})") from error


def method_of(log: EvalLog) -> str:
    """The method that our provider noted; "model" for anybody else's."""
    for sample in log.samples or []:
        if found := (sample.output.metadata or {}).get("method"):
            return str(found)
    return "model"


def outcomes(log: EvalLog) -> list[Outcome]:
    """What every judge of a log said of every reply that is its to judge."""
    names: list[str] = (log.eval.metadata or {}).get("judges", [])
    return [
        _outcome(sample, judge)
        for judge in names
        for sample in log.samples or []
        if judges_it(judge, sample.metadata)
    ]


def _outcome(sample: EvalSample, judge: str) -> Outcome:
    """Unscored where the request failed or the judge could not tell."""
    score = next((s for s in (sample.scores or {}).values() if _by(s) == judge), None)
    value = None if score is None else score.as_float()
    told = {} if score is None else score.metadata or {}
    return Outcome(
        str(sample.id),
        sample.epoch,
        sample.metadata["group"],
        sample.metadata["expects"],
        sample.metadata["picture"],
        judge,
        None if value is None or math.isnan(value) else value,
        (score.answer if score is not None else None) or "",
        told.get("ratings", {}),
        told.get("good_from", 0.0),
    )


def _by(score: Score) -> str | None:
    return (score.metadata or {}).get("judge")


def in_text(sample: EvalSample) -> tuple[str, list[str], str]:
    """The words that were asked, the images as data URLs or places, and the reply."""
    if isinstance(sample.input, str):
        return sample.input, [], sample.output.completion
    words: list[str] = []
    images: list[str] = []
    for message in sample.input:
        parts: Any = message.content
        for part in [] if isinstance(parts, str) else parts:
            if part.type == "image":
                images.append(part.image)
        words.append(message.text)
    return "\n".join(words), images, sample.output.completion
