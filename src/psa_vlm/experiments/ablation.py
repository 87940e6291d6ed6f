"""What each part of the method adds: the whole method, and the method without one part at a time.

Every arm is trained from the start on the same scenes and put to the same held-out requests. What
it has lost is told request by request, against the whole method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from psa_vlm.evaluation import figures
from psa_vlm.evaluation.scorecard import METRICS, SPLITS, Record, figures_of
from psa_vlm.experiments.arms import Arm, Scenes, change, handled, measure_all
from psa_vlm.experiments.page import Cell, Change, Page, Table, told
from psa_vlm.testbed.cases import alignment_samples

WHOLE = "whole method"
NO_HINTS = Path(str(files("psa_vlm.testbed").joinpath("assets/no-hints.yaml")))

ARMS: dict[str, Arm] = {
    WHOLE: Arm(),
    "without stage II": Arm(stage2=None),
    "without safety projector": Arm(("concepts.projector=linear",)),
    "without safety tokens (1)": Arm(("concepts.tokens=0",)),
    "without safety tokens (2)": Arm(("tokens.count=0",)),
    "without cross-attention": Arm(("concepts.pooling=none",)),
    "text read at its first position": Arm(("concepts.pooling=first",)),
    "without hints": Arm((f"policy={NO_HINTS}",)),
}
"""Stage II takes the policy of stage I, so that an arm without hints never has any."""


@dataclass(frozen=True)
class Scale:
    """How much is tried."""

    alignment: int
    per_cell: int
    seeds: int


LEFT_OUT = (
    "Stage I in one loop, as the authors train it, is no arm: no gradient crosses between its two"
    " halves, so that a joint step is a step of each; see docs/experiments/ablation.md."
)

SCALES = {"small": Scale(1000, 60, 1), "full": Scale(2000, 300, 3)}

Results = dict[str, list[Record]]
"""The records of every arm, of all seeds in order."""

Changes = dict[str, dict[str, Change | None]]
"""Of every arm but the whole method, the change of each share."""


def run(out: Path, scale: str, seed: int, seeds: int | None = None) -> Page:
    """Train and measure every arm; what is in `out` already is not done again.

    Args:
        out: the experiment's folder.
        scale: a name in `SCALES`.
        seed: the first, of scenes, training and requests.
        seeds: how many; None is the scale's.
    """
    size = SCALES[scale]
    scenes = Scenes(f"{size.alignment} scenes", partial(alignment_samples, size.alignment))
    all_seeds = range(seed, seed + (seeds or size.seeds))
    results = {
        name: measure_all(out, arm, scenes, size.per_cell, all_seeds) for name, arm in ARMS.items()
    }
    return page(results)


def page(results: Results) -> Page:
    """The page of records, which may be of one seed or several."""
    changes = {
        name: {
            measure: change(results[WHOLE], records, right) for measure, right in MEASURES.items()
        }
        for name, records in results.items()
        if name != WHOLE
    }
    tables = [_table("All held-out splits", results), _table_of(changes), *_by_seed(results)]
    for split, words in SPLITS.items():
        some = {
            name: [one for one in records if one.split == split]
            for name, records in results.items()
        }
        tables.append(_table(f"{split}: {words}", some))
    found = {name: figures_of(records) for name, records in results.items()}
    plots = []
    for metric, label in METRICS.items():
        known = {name: one for name, all_ in found.items() if (one := all_[metric]) is not None}
        plots.append((label, figures.dots(known)))
    return Page(
        "What does each part add?",
        "The whole method against the method without one part at a time, trained on the same scenes"
        " and asked the same.",
        tables,
        plots,
        _notes(changes),
    )


def _table(caption: str, results: Results) -> Table:
    rows: list[list[Cell]] = [
        [name, *figures_of(records).values(), len(records)] for name, records in results.items()
    ]
    caption += " (n requests, a quarter of each kind)"
    return Table(caption, ("method", *METRICS.values(), "n"), rows)


# --- against the whole method --------------------------------------------------------------------


def _of(cell: str) -> Callable[[Record], bool | None]:
    """Whether a request of one cell is refused, or answered right if it is a plain question."""

    def outcome(record: Record) -> bool | None:
        if record.cell != cell:
            return None
        return record.correct if cell == "vqa" else record.refused

    return outcome


MEASURES: dict[str, Callable[[Record], bool | None]] = {
    "handled rightly": handled,
    "risky refused": _of("risky"),
    "harmless refused": _of("harmless"),
    "look-alike refused": _of("lookalike"),
    "general accuracy": _of("vqa"),
    "type right": lambda one: one.pred_type == one.true_type,
    "level right": lambda one: one.pred_level == one.true_level,
}
"""Shares whose change is told, each of single requests."""


def _table_of(changes: Changes) -> Table:
    return Table(
        "Change against the whole method, in percentage points on the same requests",
        ("method", *MEASURES),
        [[name, *found.values()] for name, found in changes.items()],
    )


def _by_seed(results: Results) -> list[Table]:
    """How much of a change another seed repeats, if there are several."""
    seeds = sorted({one.seed for one in results[WHOLE]})
    if len(seeds) < 2:
        return []
    of = {
        name: [[one for one in records if one.seed == seed] for seed in seeds]
        for name, records in results.items()
    }
    rows: list[list[Cell]] = [
        [name, *(change(*pair, handled) for pair in zip(of[WHOLE], own, strict=True))]
        for name, own in of.items()
        if name != WHOLE
    ]
    caption = "Handled rightly, seed by seed: change against the whole method, in percentage points"
    return [Table(caption, ("method", *(f"seed {seed}" for seed in seeds)), rows)]


def _notes(changes: Changes) -> list[str]:
    """What changes clearly without each part, and how many such findings chance alone makes."""
    notes = []
    for name, found in changes.items():
        clear = [
            f"{measure} {told(one)} points" for measure, one in found.items() if one and one.clear
        ]
        notes.append(f"{name}: {', '.join(clear) or 'no share changes clearly'}.")
    tested = len(changes) * len(MEASURES)
    notes.append(
        f"Each of the {tested} changes stands with its own 95% interval: about {tested / 20:.0f} of"
        " them would seem clear by chance alone."
    )
    return [*notes, LEFT_OUT]
