"""The report: one HTML file that a person reads without a network, made from a run's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from psa_vlm.errors import DataError, MissingExtra
from psa_vlm.evaluation import figures
from psa_vlm.evaluation.scorecard import (
    METHODS,
    METRICS,
    SPLITS,
    Metric,
    Record,
    Row,
    Scorecard,
    format_ci,
    format_value,
    write_whole,
)
from psa_vlm.evaluation.scorers import Judge, calibration
from psa_vlm.model import pictures
from psa_vlm.model.verdict import ImageVerdict, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

BARS: tuple[Metric, ...] = ("attack_success", "over_refusal", "lookalike_refusal")
TILES: tuple[Metric, ...] = (*BARS, "accuracy")
_IN_WORDS: dict[Metric, str] = {
    "over_refusal": "refusal of harmless requests",
    "lookalike_refusal": "refusal of harmless look-alikes",
    "accuracy": "general accuracy",
}


@dataclass(frozen=True)
class Example:
    """A request before and after alignment.

    Attributes:
        before, after: the replies of the base model and of the aligned one.
        verdict: what the aligned model saw; a dict is what `Verdict.to_dict` gives.
        decision_action, decision_rule, hint: of the policy's decision.
        expected: the reply that would be right, if there is one.
    """

    image: Image
    question: str
    before: str
    after: str
    verdict: Verdict | ImageVerdict | Mapping[str, Any]
    decision_action: str
    decision_rule: str
    hint: str | None = None
    expected: str | None = None


@dataclass(frozen=True)
class Curve:
    """A training curve: a value for each of the steps."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Reliability:
    """How sure the verdicts were, and whether they were right, one entry for each."""

    confidence: list[float]
    correct: list[bool]

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> Reliability:
        """From the type verdicts of records that have a label and a confidence."""
        scored = [
            (one.type_confidence, one.pred_type == one.true_type)
            for one in records
            if one.type_confidence is not None and None not in (one.true_type, one.pred_type)
        ]
        return cls([confidence for confidence, _ in scored], [right for _, right in scored])


def write_report(
    path: str | Path,
    scorecard: Scorecard,
    examples: Sequence[Example],
    curves: Sequence[Curve],
    reliability: Reliability | None,
    *,
    command: str = "psa-vlm demo",
    judge: Judge | None = None,
) -> None:
    """Write the report as one self-contained HTML file, whole or not at all.

    Args:
        command: what was run, for the footer.
        judge: who judged the replies; names itself in the footer and marks the examples.

    Raises:
        MissingExtra: plotly is not installed.
        DataError: a curve has not as many steps as values.
    """
    judge = judge or Judge()
    charts = {f"bars-{metric}": figures.bars(scorecard, metric) for metric in BARS}
    for index, curve in enumerate(curves):
        if len(curve.steps) != len(curve.values):
            counts = f"{len(curve.steps)} steps for {len(curve.values)} values"
            raise DataError(f"curve {curve.name}: {counts}")
        charts[f"curve-{index}"] = figures.curve(curve.steps, curve.values)
    ece = None
    if reliability is not None and reliability.confidence:
        bins, ece = calibration(reliability.confidence, reliability.correct)
        charts["reliability"] = figures.reliability(bins)
    write_page(
        path,
        "report.html",
        charts,
        finding=finding(scorecard),
        card=scorecard,
        methods={m: METHODS[m] for m in METHODS if any(row.method == m for row in scorecard.rows)},
        splits=SPLITS,
        metrics=METRICS,
        bars=BARS,
        value=format_value,
        interval=format_ci,
        examples=[_shown(example, judge) for example in examples],
        curves=curves,
        ece=ece,
        command=command,
        judge=judge.name,
        duration=duration(scorecard.seconds),
    )


def write_page(
    path: str | Path, template: str, charts: Mapping[str, figures.Figure], **values: Any
) -> None:
    """Write one of this package's pages as one self-contained HTML file, whole or not at all.

    Args:
        template: its file.
        charts: Plotly figures by the id of the element that each is drawn in.
        values: what the template shows.

    Raises:
        MissingExtra: plotly is not installed.
    """
    environment = Environment(
        loader=PackageLoader("psa_vlm.evaluation", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    page = environment.get_template(template)
    write_whole(path, page.render(plotly=Markup(_plotly_js()), charts=charts, **values))


def finding(scorecard: Scorecard) -> dict[str, Any]:
    """What the scorecard says in words: {"title", "sentences", "tiles"}.

    It looks at the first split and compares the base model with the last PSA stage that was scored.
    """
    split = scorecard.splits[0] if scorecard.splits else "compositions"
    base, lora = scorecard.row("base", split), scorecard.row("lora", split)
    psa = scorecard.row("stage2", split) or scorecard.row("stage1", split)
    if psa is None or psa.attack_success is None:
        return {"title": "PSA was not scored in this run.", "sentences": [], "tiles": []}
    name, now = METHODS[psa.method], _told(psa, "attack_success")
    if base is None or base.attack_success is None:
        title = f"With {name} the model answers {now} of risky requests."
        return {"title": title, "sentences": [], "tiles": []}
    was = _told(base, "attack_success")
    if _moved(base, psa, "attack_success") < 0:
        title = f"The base model answered {was} of risky requests. With {name} it answers {now}."
    else:
        title = f"{name} did not clearly lower the attack success: {was} before, {now} after."
    sentences = [f"This is on {SPLITS[split]}, {psa.n:,} requests for each method."]
    shared = [metric for metric in TILES if metric in base.ci and metric in psa.ci]
    for verb, step in (("fell", -1), ("rose", 1), ("did not clearly change", 0)):
        moved = [
            f"{_IN_WORDS[metric]} ({_told(base, metric)} to {_told(psa, metric)})"
            for metric in shared[1:]
            if _moved(base, psa, metric) == step
        ]
        if moved:
            listed = " and ".join(filter(None, [", ".join(moved[:-1]), moved[-1]]))
            sentences.append(f"{listed[0].upper()}{listed[1:]} {verb}.")
    if lora and "attack_success" in lora.ci and "lookalike_refusal" in lora.ci:
        answered, refused = _told(lora, "attack_success"), _told(lora, "lookalike_refusal")
        sentences.append(
            f"Plain LoRA on the same data answers {answered} of risky requests "
            f"and refuses {refused} of harmless look-alikes."
        )
    tiles = [
        {"label": METRICS[metric], "before": _told(base, metric), "after": _told(psa, metric)}
        for metric in shared
    ]
    return {"title": title, "sentences": sentences, "tiles": tiles}


def _told(row: Row, metric: Metric) -> str:
    return format_value(metric, row.value(metric)).replace(".0%", "%")


def _moved(before: Row, after: Row, metric: Metric) -> int:
    """-1, 0 or 1: whether the figure fell or rose by more than the two intervals overlap."""
    (low, high), (new_low, new_high) = before.ci[metric], after.ci[metric]
    return int(new_low > high) - int(new_high < low)


def _shown(example: Example, judge: Judge) -> dict[str, Any]:
    """An example as the page's plain values."""
    verdict = example.verdict
    told = dict(verdict) if isinstance(verdict, Mapping) else verdict.to_dict()
    error = told.get("error")
    if "images" in told:
        told = {} if error else told["images"][told["worst"]]
    picture = pictures.small(example.image)
    evidence = told.get("evidence")
    heat = None if evidence is None else pictures.url(pictures.heat(evidence, picture.size))
    wanted = judge.is_refusal(example.expected) if example.expected else None
    replies = []
    for who, text in (("base", example.before), ("PSA", example.after)):
        refused = judge.is_refusal(text)
        good = None if wanted is None else refused == wanted
        replies.append({"who": who, "text": text, "refused": refused, "good": good})
    return {
        "picture": pictures.url(picture),
        "heat": heat,
        "question": example.question,
        "expected": example.expected,
        "replies": replies,
        "action": example.decision_action,
        "rule": example.decision_rule,
        "hint": example.hint,
        "error": error,
        "concepts": {
            what: [
                {"name": name.replace("_", " "), "p": p, "top": name == told[what]}
                for name, p in told[f"{what}_probs"].items()
            ]
            for what in ("type", "level")
            if f"{what}_probs" in told
        },
    }


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (f"{hours} h" * bool(hours), f"{minutes} min" * bool(minutes), f"{rest} s")
    return " ".join(filter(None, parts))


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtra("plotly", "eval") from error
    return str(get_plotlyjs())
