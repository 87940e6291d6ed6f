"""How many clean samples beside the risky ones? The paper: about as many as of one risk type.

A sample is *clean* if its type is `clean`: a request or a plain question about a scene without any
risky thing. All others are *risky*, look-alikes and plain questions about a risky thing included,
because their label is a risk type, if at level safe. Within each of the two, the cells have the
shares that they have in the testbed's own mix.

As in the paper, the risky samples stay as they are and clean ones are added, and the loss does not
weigh classes (in the testbed's own recipe it does).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation import figures
from psa_vlm.evaluation.scorecard import METRICS, SPLITS, Record, figures_of
from psa_vlm.evaluation.scorers import Interval, wilson
from psa_vlm.experiments.arms import Arm, Scenes, change, handled, measure_all
from psa_vlm.experiments.page import Page, Table, told
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.cases import ALIGNMENT_MIX, Cell, alignment_samples

RULE = 1 / 6
"""The paper's: as many clean samples as of one risk type, all six of which are as frequent here."""

RISKY: tuple[Cell, ...] = ("risky", "lookalike", "vqa")
CLEAN: tuple[Cell, ...] = ("harmless", "vqa")
DRAWN = 50  # scenes at a time, so that a smaller set is the beginning of a larger one
HANDLED = "handled rightly"


@dataclass(frozen=True)
class Line:
    """What stays the same while the ratio changes: the risky scenes, and the loss."""

    risky: int
    balanced: bool = False
    """Whether classes are weighed by the inverse of their frequency."""

    @property
    def name(self) -> str:
        return f"{self.risky} risky" + (", classes weighed" if self.balanced else "")

    @property
    def arm(self) -> Arm:
        return Arm((f"concepts.class_balance={str(self.balanced).lower()}",))


@dataclass(frozen=True)
class Scale:
    """How much is tried."""

    lines: tuple[Line, ...]
    ratios: tuple[float, ...]
    per_cell: int
    seeds: int


SCALES = {
    "small": Scale((Line(30), Line(100), Line(300)), (0.1, RULE, 1.0, 10.0), per_cell=60, seeds=1),
    "full": Scale(
        (Line(100), Line(300), Line(1000), Line(300, balanced=True)),
        (0.1, RULE, 0.3, 1.0, 3.0, 10.0),
        per_cell=300,
        seeds=3,
    ),
}

Results = dict[tuple[Line, float], list[Record]]
"""The records of every line and ratio, of all seeds in order."""


def run(out: Path, scale: str, seed: int, seeds: int | None = None) -> Page:
    """Train and measure every line and ratio; what is in `out` already is not done again.

    Args:
        out: the experiment's folder.
        scale: a name in `SCALES`.
        seed: the first, of scenes, training and requests.
        seeds: how many; None is the scale's.
    """
    size = SCALES[scale]
    all_seeds = range(seed, seed + (seeds or size.seeds))
    results: Results = {}
    for line in size.lines:
        for ratio in size.ratios:
            clean = round(line.risky * ratio)
            scenes = Scenes(
                f"{line.risky} risky and {clean} clean scenes", partial(draw, line.risky, clean)
            )
            results[line, ratio] = measure_all(out, line.arm, scenes, size.per_cell, all_seeds)
    return page(results)


def draw(risky: int, clean: int, seed: int) -> list[Sample]:
    """So many risky and clean alignment scenes; those of a smaller set are in every larger one."""
    return [*islice(_scenes(RISKY, seed), risky), *islice(_scenes(CLEAN, seed), clean)]


def _scenes(cells: tuple[Cell, ...], seed: int) -> Iterable[Sample]:
    """Endless scenes of these cells: all clean, or all risky."""
    mix = {cell: ALIGNMENT_MIX[cell] for cell in cells}
    clean = Taxonomy.default().clean
    for index in count():
        for sample in alignment_samples(DRAWN, seed, f"train-{cells[0]}-{index}", mix):
            if (sample.type == clean) == (cells == CLEAN):
                yield sample


def page(results: Results) -> Page:
    """The page of records, which may be of one seed or several."""
    found = {at: _figures(records) for at, records in results.items()}
    tables = [_table("All held-out splits", results)]
    for split, words in SPLITS.items():
        some = {at: [one for one in all_ if one.split == split] for at, all_ in results.items()}
        tables.append(_table(f"{split}: {words}", some))
    lines = list(dict.fromkeys(line for line, _ in results))
    plots = []
    for name in (HANDLED, *METRICS.values()):
        series: figures.Series = {}
        for (line, ratio), one in found.items():
            if (figure := one[name]) is not None:
                series.setdefault(line.name, []).append((ratio, figure))
        plot = figures.shares(series, "clean : risky", log=True)
        plot["layout"]["yaxis"] |= {"autorange": True, "tickformat": "~%"}  # differences are small
        plots.append((name, plot))
    notes = [sentence for line in lines for sentence in _notes(line, results)]
    return Page(
        "How many clean samples beside the risky ones?",
        "The paper's rule is about as many clean samples as of one risk type. Does it hold?",
        tables,
        plots,
        notes,
    )


def _figures(records: list[Record]) -> dict[str, Interval | None]:
    found = {METRICS[metric]: figure for metric, figure in figures_of(records).items()}
    return {HANDLED: wilson([handled(one) for one in records]), **found}


def _table(caption: str, results: Results) -> Table:
    header = ("scenes", "clean : risky", "clean", HANDLED, *METRICS.values(), "n")
    rows = []
    for (line, ratio), records in results.items():
        found = _figures(records)
        figures_ = [found[name] for name in header[3:-1]]
        rows.append([line.name, ratio, round(line.risky * ratio), *figures_, len(records)])
    return Table(f"{caption} (n requests, a quarter of each kind)", header, rows)


def _notes(line: Line, results: Results) -> list[str]:
    """Where the trade-off and the recognition of types are best, and whether the rule is there."""
    by_ratio = {ratio: records for (one, ratio), records in results.items() if one == line}
    sentences = []
    for name in (HANDLED, METRICS["type_f1"]):
        found = {ratio: _figures(records)[name] for ratio, records in by_ratio.items()}
        known = {ratio: figure for ratio, figure in found.items() if figure is not None}
        best, rule = max(known, key=lambda ratio: known[ratio].value), known[RULE]
        sentence = f"{line.name}: {name} is best at {best:.2g}, {told(known[best], name)}"
        if best == RULE:
            sentences.append(f"{sentence}, which is the paper's rule.")
            continue
        where = "within" if rule.value >= known[best].low else "below"
        sentence += f"; the paper's rule, {RULE:.2g}, has {told(rule, name)}, {where} that interval"
        if name == HANDLED:
            more = change(by_ratio[best], by_ratio[RULE], handled)
            sentence += f", {told(more)} points on the same requests"
        sentences.append(f"{sentence}.")
    return sentences
