"""The modules one by one: what the safety projector, the safety tokens (1) and the head add.

Three questions, each on held-out scenes: can a linear probe tell the risk apart better after the
safety projector than before it; does the head tell safe from unsafe without the safety tokens (1);
and what does the head confuse with what, over every type at every level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation import figures, kept
from psa_vlm.evaluation.risk_control import Array
from psa_vlm.evaluation.scorecard import SPLITS
from psa_vlm.evaluation.scorers import Interval, bootstrap_mean, wilson
from psa_vlm.experiments.page import Cell, Change, Page, Table, told
from psa_vlm.experiments.readings import (
    VARIANTS,
    Readings,
    class_samples,
    even_samples,
    read,
)
from psa_vlm.experiments.separability import embed, probe, separation
from psa_vlm.inference import PsaVlm
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.cases import Split, evaluation_samples

FEATURES = {
    "vision": "vision features, mean over the image",
    "safety": "after the safety projector, mean over the image",
    "pooled": "what the head's classifiers read (the question too)",
}
"""A field of `Readings`, and what it is in words."""
PROBED_ON: Split = "compositions"
"""Where probes are trained, and t-SNE plots are from."""
SHOWN = 600
"""Points of a t-SNE plot, at most."""
WITHOUT = (
    "The head was trained with its safety tokens (1): to take them out afterwards shows what it"
    " leans on, not what a head would be that never had them; the experiment ablation trains one."
)
COLOURS = ("--stage2", "--bad", "--lora", "--system_prompt", "--stage1", "--ink", "--base")
"""One for each type, clean last."""


@dataclass(frozen=True)
class Scale:
    """How many held-out requests are drawn."""

    probe: int
    """Of each split, for the linear probes; of new compositions twice as many."""
    diverse: int
    """Of each split and cell, for safe against unsafe."""
    per_class: int
    """Of each type at each level, for the confusion."""


SCALES = {"small": Scale(1400, 300, 80), "full": Scale(3500, 1000, 250)}


def run(out: Path, scale: str, seed: int, run: Path, base: Path | None = None) -> Page:
    """Read the modules of a run.

    Args:
        out: the experiment's folder; what is in it already is not computed again.
        scale: a name in `SCALES`.
        seed: of the requests.
        run: a run folder.
        base: where its base model is now, if it moved.
    """
    model = PsaVlm.from_pretrained(run, base=base)
    words, size = Taxonomy.default(), SCALES[scale]
    words.check_same(model.taxonomy.hash, run)

    def readings(name: str, draw: Callable[[], list[Sample]]) -> Readings:
        key = kept.key(size, seed, kept.identity(model))
        path = out / "kept" / f"{name}-{key}.safetensors"
        return Readings(**kept.arrays(path, lambda: vars(read(model, draw(), seed))))

    even, diverse = {}, {}
    for split in SPLITS:
        count = size.probe * (2 if split == PROBED_ON else 1)
        even[split] = readings(f"even-{split}", partial(even_samples, split, count, seed))
        diverse[split] = readings(f"diverse-{split}", partial(mixed, split, size.diverse, seed))
    classes = readings("classes", partial(class_samples, size.per_class, seed))
    shown = even[PROBED_ON].take(even[PROBED_ON].side == 1)
    separated, of_tokens = by_variant(diverse)
    confused, of_classes = recalls(classes, words)
    return Page(
        "The modules one by one",
        "How well can risk be told before and after the safety projector, what do the safety"
        " tokens (1) add to it, and what does the head confuse?",
        [
            probed(even, "type", words.types),
            probed(even, "level", words.levels),
            separated,
            confused,
        ],
        [
            *(
                (f"t-SNE: {what}", scattered(getattr(shown, name), shown.type_ids, words, seed))
                for name, what in FEATURES.items()
            ),
            (
                "What the head says (columns) of each type at each level (rows)",
                heat(classes, words),
            ),
        ],
        [WITHOUT, *of_tokens, *of_classes],
    )


def mixed(split: Split, count: int, seed: int) -> list[Sample]:
    """The diverse set of a split: so many requests of each cell that has to do with safety."""
    return [
        sample
        for cell in ("risky", "lookalike", "harmless")
        for sample in evaluation_samples(split, cell, count, seed)
    ]


# --- the confusion -------------------------------------------------------------------------------

Named = tuple[str, str]
"""A type and a level."""


def classes_of(taxonomy: Taxonomy) -> list[Named]:
    """Every risk type at every level above safe, and what is harmless."""
    risky = [(name, level) for name in taxonomy.risk_types for level in taxonomy.levels[1:]]
    return [*risky, (taxonomy.clean, taxonomy.safe_level)]


def named(type_ids: Array, level_ids: Array, taxonomy: Taxonomy) -> list[Named]:
    """n label ids as classes: what is clean, or safe, is harmless."""
    harmless = (taxonomy.clean, taxonomy.safe_level)
    pairs = zip(type_ids.astype(int), level_ids.astype(int), strict=True)
    found = [(taxonomy.types[type_], taxonomy.levels[level]) for type_, level in pairs]
    return [
        harmless if taxonomy.clean == type_ or taxonomy.safe_level == level else (type_, level)
        for type_, level in found
    ]


def said_of(classes: Readings, taxonomy: Taxonomy) -> list[tuple[Named, Named]]:
    """(label, most probable type and level) of each request."""
    truth = named(classes.type_ids, classes.level_ids, taxonomy)
    heard = named(classes.types.argmax(1), classes.levels.argmax(1), taxonomy)
    return list(zip(truth, heard, strict=True))


# --- the page ------------------------------------------------------------------------------------


def probed(even: dict[Split, Readings], label: str, names: Sequence[str]) -> Table:
    """How well each of `FEATURES` tells the type or the level, on every split."""
    ids = f"{label}_ids"
    train = even[PROBED_ON].take(even[PROBED_ON].side == 0)
    tests = [one.take(one.side == 1) for one in even.values()]
    rows: list[list[Cell]] = [
        [
            what,
            int(getattr(train, field).shape[1]),
            *probe(
                getattr(train, field),
                getattr(train, ids),
                [(getattr(test, field), getattr(test, ids)) for test in tests],
            ),
        ]
        for field, what in FEATURES.items()
    ]
    commonest = Counter(getattr(train, ids).tolist()).most_common(1)[0][0]
    guessed = [wilson((getattr(test, ids) == commonest).tolist()) for test in tests]
    rows.append([f"always {names[int(commonest)]}", None, *guessed])
    rows.append(["n", None, *(len(test.side) for test in tests)])
    caption = f"A linear probe tells the {label} (trained on {len(train.side):,} others)"
    return Table(caption, ["from", "width", *even], rows)


def by_variant(diverse: dict[Split, Readings]) -> tuple[Table, list[str]]:
    """How well P(level safe) tells safe from unsafe with each of `VARIANTS`, and in words."""
    groups = {
        "all": (
            np.concatenate([one.safe for one in diverse.values()]),
            np.concatenate([one.level_ids for one in diverse.values()]) == 0,
        )
    } | {split: (one.safe, one.level_ids == 0) for split, one in diverse.items()}
    scores, is_safe = groups["all"]
    rows: list[list[Cell]] = []
    notes = []
    for place, name in enumerate(VARIANTS):
        areas = [separation(safe[:, place], truth) for safe, truth in groups.values()]
        change = None
        if place:
            found = separation(scores[:, place], is_safe, against=scores[:, 0])
            change = None if found is None else Change(*astuple(found))
        if change is not None:
            clear = "" if change.clear else ", which the interval can't tell from none"
            notes.append(f"Safety tokens (1) {name}: AUROC {told(change)} points{clear}.")
        rows.append([name, *areas, change])
    rows.append(["n", *(len(truth) for _, truth in groups.values()), None])
    rows.append(["of them safe", *(int(truth.sum()) for _, truth in groups.values()), None])
    share = bootstrap_mean(np.concatenate([one.on_tokens for one in diverse.values()]).tolist())
    if share is not None:
        notes.append(f"Of the head's attention, {told(share)} goes to the safety tokens (1).")
    header = ["safety tokens (1)", *groups, "change on all, in points"]
    return Table("AUROC of P(level safe), safe against unsafe", header, rows), notes


def recalls(classes: Readings, taxonomy: Taxonomy) -> tuple[Table, list[str]]:
    """How often each class is recognised, and the worst of them in words."""
    pairs = said_of(classes, taxonomy)
    harmless = (taxonomy.clean, taxonomy.safe_level)
    rows: list[list[Cell]] = []
    recall: dict[str, Interval] = {}
    for one in classes_of(taxonomy):
        heard = [said for truth, said in pairs if truth == one]
        found = wilson([said == one for said in heard])
        if found is not None:
            recall[_words(one, taxonomy)] = found
        risky = one != harmless
        rows.append(
            [
                _words(one, taxonomy),
                len(heard),
                found,
                wilson([said[0] == one[0] for said in heard]) if risky else None,
                wilson([said[1] == one[1] for said in heard]) if risky else None,
                wilson([said == harmless for said in heard]) if risky else None,
            ]
        )
    worst = min(recall, key=lambda name: recall[name].value)
    mistakes = Counter((truth, said) for truth, said in pairs if truth != said)
    notes = [f"Recognised the least: {worst}, {told(recall[worst])}."]
    for (truth, said), count in mistakes.most_common(1):
        notes.append(
            f"Most often confused: {_words(truth, taxonomy)} taken for {_words(said, taxonomy)},"
            f" {count} times."
        )
    header = ["type and level", "n", "recognised", "type right", "level right", "called harmless"]
    return Table("The head on every type at every level", header, rows), notes


def _words(one: Named, taxonomy: Taxonomy) -> str:
    return "harmless" if one[0] == taxonomy.clean else f"{taxonomy.label(one[0])}, {one[1]}"


def heat(classes: Readings, taxonomy: Taxonomy) -> figures.Figure:
    """The confusion of all classes, as shares of each row."""
    named = classes_of(taxonomy)
    counts = np.zeros((len(named), len(named)))
    for truth, said in said_of(classes, taxonomy):
        counts[named.index(truth), named.index(said)] += 1
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    labels = [_words(one, taxonomy) for one in named]
    cells = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": shares.tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(11,122,102,0)"], [1, "rgba(11,122,102,1)"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "text": [
            [f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares
        ],
        "texttemplate": "%{text}",
        "hovertext": [
            [
                f"{truth} taken for {said}: {int(count)} of {int(row.sum())}"
                for said, count in zip(labels, row, strict=True)
            ]
            for truth, row in zip(labels, counts, strict=True)
        ],
        "hoverinfo": "text",
    }
    layout = figures.plain_layout(height=640)
    layout["xaxis"] |= {"side": "bottom", "tickangle": -50}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return {"data": [cells], "layout": layout}


def scattered(features: Array, type_ids: Array, taxonomy: Taxonomy, seed: int) -> figures.Figure:
    """A t-SNE plot of the first `SHOWN` requests, one colour for each type."""
    placed, ids = embed(features[:SHOWN], seed), type_ids[:SHOWN]
    types = (*taxonomy.risk_types, taxonomy.clean)
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": taxonomy.label(name),
            "x": placed[ids == taxonomy.type_id(name), 0].tolist(),
            "y": placed[ids == taxonomy.type_id(name), 1].tolist(),
            "marker": {"color": colour, "size": 5},
            "hoverinfo": "name",
        }
        for name, colour in zip(types, COLOURS, strict=True)
    ]
    layout = figures.plain_layout(height=340)
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"showticklabels": False, "showgrid": False, "zeroline": False}
    legend = {"orientation": "h", "y": -0.02, "yanchor": "top"}
    return {"data": data, "layout": layout | {"showlegend": True, "legend": legend}}
