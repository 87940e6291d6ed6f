"""Evaluations side by side: figures with paired tests, and the replies on which they differ."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from psa_vlm.data.images import open_images
from psa_vlm.errors import DataError, ImageError
from psa_vlm.evaluation import figures as charts
from psa_vlm.evaluation.measures import ALL, Figure, by_item, measured, parts
from psa_vlm.evaluation.outcomes import Outcome, in_text
from psa_vlm.evaluation.outcomes import outcomes as outcomes_of
from psa_vlm.evaluation.report import write_page
from psa_vlm.evaluation.results import Results
from psa_vlm.evaluation.tasks.base import data_url

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog

DRAWS = 10_000
"""Of the permutation test."""
SHOWN = 40
"""Most disagreements on a page."""
LETTERS = "ABCDEFGH"


class Difference(BaseModel):
    """One figure of two evaluations on the requests that both scored.

    `change` is the second's minus the first's; `p` is of the paired `test` that nothing differs,
    and `adjusted` is p after Holm, over all differences of the comparison.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: str
    group: str
    judge: str
    first: str
    second: str
    change: float
    of: float
    n: int
    test: str
    p: float
    adjusted: float = 1.0


class Comparison(BaseModel):
    """Evaluations of one task; `first` in a difference is a key of `results`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    results: dict[str, Results]
    differences: list[Difference]
    seed: int

    def table(self) -> Group:
        """For the terminal, within 100 columns: a column for each evaluation, then the tests."""
        table = Table(title=self.task, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for name in ("measure", "group", "judge"):
            table.add_column(name, overflow="fold")
        for letter in self.results:
            table.add_column(letter, justify="right")
        for key, row in self.rows().items():
            cells = ["-" if one is None else _cell(one) for one in row]
            table.add_row(*key, *cells, style="bold" if key[1] == ALL else "")
        legend = [f"{letter}: {_named(one)}" for letter, one in self.results.items()]
        tests = Table("figure", "judge", "between", "change", "p", "Holm", "n", box=box.SIMPLE_HEAD)
        for one in self.differences:
            if one.group == ALL:
                between = f"{one.first} to {one.second}"
                told = (one.measure, one.judge, between, _change(one), f"{one.p:.4f}")
                tests.add_row(*told, f"{one.adjusted:.4f}", str(one.n))
        return Group(table, Text("\n".join(legend)), tests, Text(self.caption))

    @property
    def caption(self) -> str:
        """What the tests are."""
        kinds = " and ".join(sorted({one.test for one in self.differences})) or "none"
        return f"paired tests: {kinds}; Holm over {len(self.differences)}; seed {self.seed}"

    def rows(self) -> dict[tuple[str, str, str], list[Figure | None]]:
        """(measure, group, judge) -> the figure of each evaluation, None where it has none."""
        found: dict[tuple[str, str, str], list[Figure | None]] = {}
        for place, results in enumerate(self.results.values()):
            for one in results.figures:
                key = (one.measure, one.group, one.judge)
                found.setdefault(key, [None] * len(self.results))[place] = one
        return found


def compare(logs: Sequence[EvalLog], seed: int = 0) -> Comparison:
    """Compare evaluations of one task; the order of the logs is that of the columns.

    Raises:
        DataError: there are not 2 to 8, they are of several tasks, or share no request.
    """
    if not 2 <= len(logs) <= len(LETTERS):
        raise DataError(f"compare 2 to {len(LETTERS)} evaluations, not {len(logs)}")
    if len(tasks := {log.eval.task for log in logs}) > 1:
        raise DataError(f"these are of several tasks ({', '.join(sorted(tasks))}): compare one")
    named = dict(zip(LETTERS, logs, strict=False))
    found = {letter: outcomes_of(log) for letter, log in named.items()}
    differences = [
        one
        for (first, a), (second, b) in combinations(found.items(), 2)
        for one in _differences(first, a, second, b, seed)
    ]
    if not differences:
        raise DataError("these evaluations share no scored request; were they of the same data?")
    return Comparison(
        task=logs[0].eval.task,
        results={letter: Results.from_log(log) for letter, log in named.items()},
        differences=_holm(differences),
        seed=seed,
    )


def _differences(
    first: str, a: Sequence[Outcome], second: str, b: Sequence[Outcome], seed: int
) -> list[Difference]:
    """Every figure that both have, on the requests that both scored."""
    made = []
    after = {(part.judge, part.group): part for part in parts(b)}
    for one in parts(a):
        other = after.get((one.judge, one.group))
        values = {m: by_item(v) for m, v, _ in measured(other.outcomes, one.judge)} if other else {}
        for measure, own, of in measured(one.outcomes, one.judge):
            theirs = values.get(measure, {})
            pairs = [(x, theirs[item]) for item, x in by_item(own).items() if item in theirs]
            if not pairs:
                continue
            test, p = paired_test(pairs, seed)
            made.append(
                Difference(
                    measure=measure,
                    group=one.group,
                    judge=one.judge,
                    first=first,
                    second=second,
                    change=float(np.mean([y - x for x, y in pairs])),
                    of=of,
                    n=len(pairs),
                    test=test,
                    p=p,
                )
            )
    return made


def paired_test(pairs: Sequence[tuple[float, float]], seed: int = 0) -> tuple[str, float]:
    """The name of the fitting test, and its two-sided p, that nothing differs.

    McNemar's exact test where every value is 0 or 1, else a permutation test that swaps the two
    values of each request (all swaps up to 12 requests that differ, else seeded draws).
    """
    if all(value in (0, 1) for pair in pairs for value in pair):
        from scipy.stats import binomtest

        rose = sum(y > x for x, y in pairs)
        moved = sum(y != x for x, y in pairs)
        return "McNemar's exact", float(binomtest(rose, moved).pvalue) if moved else 1.0
    changes = np.asarray([y - x for x, y in pairs if x != y])
    if not len(changes):
        return "permutation", 1.0
    seen = abs(changes.sum()) - 1e-9
    if len(changes) <= 12:
        places = np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1
        return "permutation", float((abs((2 * places - 1) @ changes) >= seen).mean())
    signs = np.random.default_rng(seed).choice((-1, 1), (DRAWS, len(changes)))
    return "permutation", float(((abs(signs @ changes) >= seen).sum() + 1) / (DRAWS + 1))


def _holm(differences: Sequence[Difference]) -> list[Difference]:
    """The same with p adjusted for how many there are (Holm 1979)."""
    order = sorted(range(len(differences)), key=lambda i: differences[i].p)
    adjusted, highest = {}, 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * differences[i].p))
        adjusted[i] = highest
    return [one.model_copy(update={"adjusted": adjusted[i]}) for i, one in enumerate(differences)]


# --- the replies on which they differ ------------------------------------------------------------


Said = dict[str, tuple[float | None, str]]
"""Judge -> whether a reply was good, None unscored, and what the judge made of it."""


@dataclass(frozen=True)
class Reply:
    """One reply, and what each judge said of it."""

    letter: str
    text: str
    said: Said


@dataclass(frozen=True)
class Case:
    """A request with the replies of all evaluations."""

    item: str
    group: str
    expects: str
    question: str
    images: list[str]
    replies: list[Reply]


def disagreements(logs: Sequence[EvalLog], seed: int = 0, most: int = SHOWN) -> list[Case]:
    """Requests on whose replies models, or the judges of one reply, differ; first times asked.

    Args:
        logs: of one task.
        seed: of the draw where there are more than `most`.
        most: how many are wanted.
    """
    samples = [
        {str(one.id): one for one in log.samples or [] if one.epoch == 1 and one.error is None}
        for log in logs
    ]
    said = [_said(log) for log in logs]
    differing = [
        item
        for item in samples[0]
        if all(item in own for own in samples)
        and all(item in own for own in said)
        and _differ([own[item] for own in said])
    ]
    if len(differing) > most:
        drawn = set(Random(seed).sample(differing, most))
        differing = [item for item in differing if item in drawn]
    cases = []
    for item in differing:
        question, images, _ = in_text(samples[0][item])
        replies = [
            Reply(letter, in_text(own[item])[2], told[item])
            for letter, own, told in zip(LETTERS, samples, said, strict=False)
        ]
        metadata = samples[0][item].metadata
        cases.append(Case(item, metadata["group"], metadata["expects"], question, images, replies))
    return cases


def _said(log: EvalLog) -> dict[str, Said]:
    """Item -> what was said of its first reply."""
    found: dict[str, Said] = {}
    for one in outcomes_of(log):
        if one.epoch == 1:
            found.setdefault(one.item, {})[one.judge] = (one.good, one.answer)
    return found


def _differ(said: Sequence[Said]) -> bool:
    """Whether the judges of one reply differ, or one judge between replies."""
    goods = [{judge: good for judge, (good, _) in own.items() if good is not None} for own in said]
    within = any(len(set(own.values())) > 1 for own in goods)
    between = any(len({own[j] for own in goods if j in own}) > 1 for own in goods for j in own)
    return within or between


# --- the page ------------------------------------------------------------------------------------


def write_comparison(
    path: Path, comparison: Comparison, cases: Sequence[Case], command: str
) -> None:
    """Write a comparison as one self-contained HTML file, whole or not at all.

    Raises:
        MissingExtra: plotly is not installed.
    """
    measures = list(dict.fromkeys((m, j) for m, _, j in comparison.rows()))
    drawn = {f"bars-{i}": _bars(comparison, *key) for i, key in enumerate(measures)}
    write_page(
        path,
        "compare.html",
        drawn,
        one=comparison,
        named=_named,
        measures=measures,
        rows=comparison.rows(),
        told=_cell,
        change=_change,
        letters=list(comparison.results),
        cases=[(case, [thumbnail(image) for image in case.images]) for case in cases],
        command=command,
    )


def _bars(comparison: Comparison, measure: str, judge: str) -> charts.Figure:
    """A group of bars for each group of requests, a bar for each evaluation."""
    data: list[dict[str, Any]] = []
    for place, letter in enumerate(comparison.results):
        own = [
            row[place]
            for key, row in comparison.rows().items()
            if (key[0], key[2]) == (measure, judge)
        ]
        shown = [one for one in own if one is not None]
        data.append(
            {
                "type": "bar",
                "name": letter,
                "x": [one.group for one in shown],
                "y": [one.value for one in shown],
                "marker": {"color": f"--c{place}"},
                "error_y": charts.error_bars(shown, "--muted"),
                "hovertext": [f"{letter}, {one.group}: {_cell(one)}" for one in shown],
                "hoverinfo": "text",
            }
        )
    layout = charts.plain_layout(height=280)
    return {"data": data, "layout": layout | {"barmode": "group", "bargap": 0.28}}


def thumbnail(url: str, side: int = 320) -> str:
    """A small copy of an image in a data URL; the empty text where it can't be shown."""
    try:
        picture = open_images(base64.b64decode(url.partition(",")[2]))[0]
    except (ImageError, ValueError):
        return ""
    picture.thumbnail((side, side))
    return data_url(picture)


def _named(one: Results) -> str:
    return f"{one.model} ({one.method}), {one.requests:,} requests, commit {one.commit}"


def _cell(one: Figure) -> str:
    value, interval = one.told
    return f"{value} ({interval}; n {one.n})"


def _change(one: Difference) -> str:
    return f"{100 * one.change:+.1f}%" if one.of == 1 else f"{one.change:+.2f}"
