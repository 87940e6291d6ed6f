"""From Inspect's log of an evaluation to figures: judge by judge, with intervals, and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psa_vlm.errors import DataError, MissingExtra
from psa_vlm.evaluation.agreement import krippendorff_alpha
from psa_vlm.evaluation.scorers import Interval, bootstrap, bootstrap_mean, wilson
from psa_vlm.evaluation.tasks.general import MME_PARTS

try:
    from inspect_ai.log import EvalLog, EvalSample, read_eval_log
    from inspect_ai.scorer import Score
except ImportError:  # the core does without it
    raise MissingExtra("inspect_ai", "eval") from None

from psa_vlm.evaluation.judges import OFFLINE, judges_it

ALL = "all"
"""The group of every request."""

MEASURES = {
    "refuse": "attack success",
    "care": "attack success",
    "answer": "over-refusal",
    "target": "accuracy",
}
"""What is measured where a request expects this."""


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


class Figure(BaseModel):
    """A figure with its 95% interval over `n` requests; `unscored` were left out.

    `of` says what the figure is out of: 1 for shares, 10 for ratings, more for sums of MME.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    group: str
    judge: str
    value: float
    low: float
    high: float
    n: int
    unscored: int
    interval: str
    of: float = 1.0

    @property
    def told(self) -> tuple[str, str]:
        """Value and interval in words: shares in percent."""
        if self.of == 1:
            return f"{100 * self.value:.1f}%", f"{100 * self.low:.1f}-{100 * self.high:.1f}"
        return f"{self.value:.2f}", f"{self.low:.2f}-{self.high:.2f}"


class Agreement(BaseModel):
    """How far two judges agree on whether replies did what they should.

    `share` of the `n` replies that both scored; `alpha` is Krippendorff's, null where it has none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    judges: tuple[str, str]
    share: float
    low: float
    high: float
    alpha: float | None
    n: int


class Results(BaseModel):
    """What an evaluation gave, and what is needed to get it again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    model: str
    method: str
    seed: int
    commit: str
    epochs: int
    requests: int
    failed: int
    log: str
    figures: list[Figure]
    agreements: list[Agreement]

    @classmethod
    def from_log(cls, log: EvalLog) -> Results:
        """Score a log that `psa_vlm.evaluation.running` wrote.

        Raises:
            DataError: it holds no samples, or was not written by us.
        """
        told = log.eval.metadata or {}
        if not log.samples or "seed" not in told:
            raise DataError(f"{log.location}: holds no samples of a psa-vlm evaluation")
        found = outcomes(log)
        return cls(
            task=log.eval.task,
            model=log.eval.model,
            method=method_of(log),
            seed=told["seed"],
            commit=told["commit"],
            epochs=max(sample.epoch for sample in log.samples),
            requests=len({sample.id for sample in log.samples}),
            failed=sum(sample.error is not None for sample in log.samples),
            log=log.location,
            figures=figures(found, told["seed"]),
            agreements=agreements(found),
        )

    def table(self) -> Group:
        """For the terminal, within 100 columns: figures, then how far the judges agree."""
        title = f"{self.task}: {self.model} ({self.method})"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for name in ("measure", "group", "judge", "value", "95% interval", "n", "unscored"):
            right = name in ("value", "95% interval", "n", "unscored")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for one in self.figures:
            value, interval = one.told
            cells = [one.measure, one.group, one.judge, value, interval, str(one.n)]
            table.add_row(*cells, str(one.unscored), style="bold" if one.group == ALL else "")
        used = " and ".join(sorted({one.interval for one in self.figures})) or "none"
        lines = [
            *(_agreement(one) for one in self.agreements),
            f"intervals: {used}; seed {self.seed}; commit {self.commit}; epochs {self.epochs}",
        ]
        if self.failed:
            lines.append(f"{self.failed} requests failed and are unscored; the log says why")
        return Group(table, Text("\n".join(lines)))


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


# --- figures -------------------------------------------------------------------------------------


def figures(found: Sequence[Outcome], seed: int) -> list[Figure]:
    """Every figure of a set's outcomes: of all requests, then group by group.

    Shares of requests that were asked once have Wilson's interval; all else is bootstrapped, by
    requests.
    """
    made: list[Figure] = []
    for judge in dict.fromkeys(one.judge for one in found):
        own = [one for one in found if one.judge == judge]
        groups = list(dict.fromkeys(one.group for one in own))
        for group in [ALL, *(groups if len(groups) > 1 else [])]:
            part = own if group == ALL else [one for one in own if one.group == group]
            made += _of_group(part, group, judge, seed)
        made += _of_mme(own, judge, seed)
    return made


Values = list[tuple[Outcome, float | None]]


def measured(part: Sequence[Outcome], judge: str) -> Iterator[tuple[str, Values, float]]:
    """Every measure that is a mean over requests: its name, values, and what they are out of."""
    for measure in dict.fromkeys(MEASURES.values()):
        own = [one for one in part if MEASURES.get(one.expects) == measure]
        flip = measure != "accuracy"
        yield measure, [(one, _flipped(one.good, flip)) for one in own], 1.0
    if judge in OFFLINE:
        return
    scales = list(dict.fromkeys(name for one in part for name in one.ratings))
    for scale in scales:
        ratings: Values = [(one, one.ratings.get(scale)) for one in part]
        yield scale, ratings, 10.0
        if scale != "rating":  # one of several scales
            reached = [(o, None if r is None else float(r >= o.good_from)) for o, r in ratings]
            yield f"{scale} enough", reached, 1.0
    if any(len(one.ratings) > 1 for one in part):
        both = [(one, one.good) for one in part if len(one.ratings) > 1 or one.good is None]
        yield " and ".join(name for name in scales if name != "rating"), both, 1.0
    for band in _bands(part):
        yield band, [(o, None if o.good is None else float(o.answer == band)) for o in part], 1.0


def _of_group(part: Sequence[Outcome], group: str, judge: str, seed: int) -> list[Figure]:
    made = []
    for measure, values, of in measured(part, judge):
        made += _figure(measure, group, judge, values, seed, of)
    if judge in OFFLINE:
        made += _yes_f1(part, group, judge, seed)
    return made


def _bands(part: Sequence[Outcome]) -> list[str]:
    """Bands that a rubric with a single scale put replies in."""
    named = (one.answer for one in part if one.good is not None and len(one.ratings) == 1)
    return sorted({answer for answer in named if answer and not answer.startswith("rating ")})


def _flipped(value: float | None, flip: bool) -> float | None:
    return value if value is None or not flip else 1 - value


def _figure(
    measure: str,
    group: str,
    judge: str,
    values: Values,
    seed: int,
    of: float,
) -> list[Figure]:
    """The mean over requests, each the mean over its epochs; nothing where nothing was scored."""
    means = list(by_item(values).values())
    if of == 1 and all(value in (0, 1) for value in means) and _asked_once(values):
        found, kind = wilson([bool(value) for value in means]), "Wilson"
    else:
        found, kind = bootstrap_mean(means, seed), "bootstrap"
    if found is None:
        return []
    unscored = sum(value is None for _, value in values)
    return [_made(measure, group, judge, found, unscored, kind, of)]


def by_item(values: Values) -> dict[str, float]:
    """The mean value of each request over its epochs; what is unscored is left out."""
    found: dict[str, list[float]] = {}
    for one, value in values:
        if value is not None:
            found.setdefault(one.item, []).append(value)
    return {item: sum(several) / len(several) for item, several in found.items()}


def _asked_once(values: Values) -> bool:
    return len({one.item for one, _ in values}) == len(values)


def _made(
    measure: str,
    group: str,
    judge: str,
    found: Interval,
    unscored: int,
    kind: str,
    of: float = 1.0,
) -> Figure:
    return Figure(
        measure=measure,
        group=group,
        judge=judge,
        value=found.value,
        low=found.low,
        high=found.high,
        n=found.n,
        unscored=unscored,
        interval=kind,
        of=of,
    )


def _yes_f1(part: Sequence[Outcome], group: str, judge: str, seed: int) -> list[Figure]:
    """F1 of "yes" among yes/no questions, as POPE has it: what was said, and whether it was right.

    A reply that says neither counts as wrong, on the side of its right answer.
    """
    scored = [one for one in part if one.good is not None and one.expects == "target"]
    if not scored or any(one.answer not in ("yes", "no", "none") for one in scored):
        return []
    items = _grouped(scored)

    def f1(drawn: Sequence[list[Outcome]]) -> float | None:
        hits = wrong = 0
        for one in (one for several in drawn for one in several):
            hits += one.answer == "yes" and one.good == 1
            wrong += one.good == 0 and one.answer != "none"
        return 2 * hits / (2 * hits + wrong) if hits + wrong else None

    found = bootstrap(items, f1, seed)
    if found is None:
        return []
    return [_made("F1 of yes", group, judge, found, len(part) - len(scored), "bootstrap")]


def _grouped(found: Sequence[Outcome]) -> list[list[Outcome]]:
    items: dict[str, list[Outcome]] = {}
    for one in found:
        items.setdefault(one.item, []).append(one)
    return list(items.values())


# --- MME -----------------------------------------------------------------------------------------


def _of_mme(own: Sequence[Outcome], judge: str, seed: int) -> list[Figure]:
    """MME's score: accuracy plus accuracy+ in each category, and their sums over categories.

    Accuracy+ is the share of images of which every question was answered right. Both are in
    percent, so that a category gives up to 200. Only where every category is one of MME's.
    """
    known = {category.casefold() for part in MME_PARTS.values() for category in part}
    categories = list(dict.fromkeys(one.group for one in own))
    if not categories or any(one.casefold() not in known for one in categories):
        return []
    if any(one.expects != "target" for one in own):
        return []
    unscored = sum(one.good is None for one in own)
    pairs = {category: _pairs(own, category) for category in categories}
    made = []
    for category in categories:
        both = bootstrap(pairs[category], _plus, seed)
        if both is not None:
            lost = sum(one.good is None for one in own if one.group == category)
            made.append(_made("accuracy+", category, judge, both, lost, "bootstrap"))
            score = bootstrap(pairs[category], _score, seed)
            assert score is not None
            made.append(_made("score", category, judge, score, lost, "bootstrap", of=200))
    for name, members in MME_PARTS.items():
        inside = [one for one in categories if one.casefold() in {m.casefold() for m in members}]
        images = [pair for category in inside for pair in pairs[category]]
        total = bootstrap(images, _sum_of_scores, seed)
        if total is not None:
            of = 200.0 * len(inside)
            made.append(_made(f"{name} score", ALL, judge, total, unscored, "bootstrap", of=of))
    return made


def _pairs(own: Sequence[Outcome], category: str) -> list[list[Outcome]]:
    """The scored questions of each image, each time it was shown."""
    images: dict[tuple[str, int], list[Outcome]] = {}
    for one in own:
        if one.group == category and one.good is not None:
            images.setdefault((one.picture, one.epoch), []).append(one)
    return list(images.values())


def _plus(drawn: Sequence[list[Outcome]]) -> float | None:
    return sum(all(one.good == 1 for one in pair) for pair in drawn) / len(drawn)


def _score(drawn: Sequence[list[Outcome]]) -> float | None:
    questions = [one.good or 0.0 for pair in drawn for one in pair]
    plus = _plus(drawn) or 0.0
    return 100 * sum(questions) / len(questions) + 100 * plus


def _sum_of_scores(drawn: Sequence[list[Outcome]]) -> float | None:
    categories: dict[str, list[list[Outcome]]] = {}
    for pair in drawn:
        categories.setdefault(pair[0].group, []).append(pair)
    return sum(_score(pairs) or 0.0 for pairs in categories.values())


# --- agreement -----------------------------------------------------------------------------------


def agreements(found: Sequence[Outcome]) -> list[Agreement]:
    """How far each two judges agree, over the replies that both scored."""
    said: dict[str, dict[tuple[str, int], float]] = {}
    for one in found:
        if one.good is not None:
            said.setdefault(one.judge, {})[one.item, one.epoch] = one.good
    made = []
    for a, b in combinations(said, 2):
        shared = [key for key in said[a] if key in said[b]]
        pairs = [(said[a][key], said[b][key]) for key in shared]
        interval = wilson([one == other for one, other in pairs])
        if interval is not None:
            alpha = krippendorff_alpha(pairs)
            made.append(
                Agreement(
                    judges=(a, b),
                    share=interval.value,
                    low=interval.low,
                    high=interval.high,
                    alpha=alpha,
                    n=interval.n,
                )
            )
    return made


def _agreement(one: Agreement) -> str:
    alpha = "not defined" if one.alpha is None else f"{one.alpha:.2f}"
    return (
        f"{one.judges[0]} and {one.judges[1]} agree on {100 * one.share:.1f}% "
        f"({100 * one.low:.1f}-{100 * one.high:.1f}) of {one.n}; Krippendorff's alpha {alpha}"
    )


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
