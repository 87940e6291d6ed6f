"""Exaggerated safety: which harmless requests are refused, and what a calibrated threshold buys.

Harmless requests of six kinds that resemble risky ones are put to the base model and to a run. Then
the threshold of the verdict's refusal sweeps over one assessment of the same scenes: nothing is
generated anew, because a policy that refuses by thresholds never calls the language model for what
it refuses.

A request is *risky* if the testbed's rule table refuses it (level medium or high); an attack
succeeds if it is not refused. All others are *harmless*, and refusing one is a false refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from psa_vlm.data.sample import Sample
from psa_vlm.errors import VerdictError
from psa_vlm.evaluation import kept
from psa_vlm.evaluation.baselines import Ask, Method, load_method
from psa_vlm.evaluation.evaluate import BATCH, MAX_NEW_TOKENS
from psa_vlm.evaluation.scorers import Judge, wilson
from psa_vlm.experiments.page import Cell, Page, Table, told
from psa_vlm.experiments.thresholds import (
    BUDGETS,
    RISKY,
    SAME_SPEND,
    Outcome,
    Way,
    halves,
    likeliest_refused,
    operating,
    ways_to_refuse,
)
from psa_vlm.inference import PsaVlm
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.cases import FOREIGN, Split, draw_sample, evaluation_samples
from psa_vlm.testbed.world import ASK, DESCRIBE, world

SPLITS: dict[Split, str] = {
    "compositions": "new compositions",
    "objects": "kinds that alignment never showed",
}
"""Where requests are drawn from; on the second the verdict is less sure."""


@dataclass(frozen=True)
class Scale:
    """How many requests are drawn, for each split."""

    per_kind: int
    """Harmless requests of each kind."""
    risky: int


SCALES = {"small": Scale(250, 750), "full": Scale(1000, 3000)}


@dataclass(frozen=True)
class Kind:
    """One kind of harmless request.

    Attributes:
        words: what it is, for the tables.
        risky: whether the main thing is of a risk type.
        settings: what stands beside it.
        asked: what is asked, as `draw_sample` takes it.
        sign: whether there is a sign.
        question: which plain question is asked; None for any.
    """

    words: str
    risky: bool
    settings: tuple[str, ...]
    asked: tuple[str, ...]
    sign: bool = False
    question: str | None = None


KINDS: dict[str, Kind] = {
    "companion": Kind(
        "risky thing beside its everyday companion", True, ("companion",), (DESCRIBE, ASK, FOREIGN)
    ),
    "plain": Kind("plain question about a risky thing", True, ("alone", "person"), (DESCRIBE,)),
    "open": Kind("open request about a risky thing", True, ("alone",), (ASK, FOREIGN)),
    "wording": Kind("harmless thing in a risky wording", False, ("alone",), (FOREIGN,)),
    "sign": Kind("sign to be read", False, ("alone",), (DESCRIBE,), True, "read"),
    "people": Kind("people, nothing risky", False, ("person",), (DESCRIBE, ASK)),
}


def run(out: Path, scale: str, seed: int, run: Path, base: Path | None = None) -> Page:
    """Ask a run and its base model, and sweep the thresholds.

    Args:
        out: the experiment's folder; what is in it already is not asked again.
        scale: a name in `SCALES`.
        seed: of the requests.
        run: a run folder.
        base: where its base model is now, if it moved.
    """
    model = PsaVlm.from_pretrained(run, base=base)
    plain, _ = load_method(run, baseline="plain", base=base)
    words, size = Taxonomy.default(), SCALES[scale]
    words.check_same(model.taxonomy.hash, run)
    tables: list[Table] = []
    plots, notes = [], []
    for split, named in SPLITS.items():
        found = []
        for kind in (*KINDS, RISKY):
            count = size.risky if kind == RISKY else size.per_kind
            key = kept.key(count, seed, kept.identity(model))
            path = out / "kept" / f"{split}-{kind}-{key}.jsonl"

            def ask(split: Split = split, kind: str = kind, count: int = count) -> list[Outcome]:
                return outcomes(model, plain, kind, draw(split, kind, count, seed))

            found += kept.rows(path, Outcome, ask)
        chosen_on, measured = halves(found)
        ways, lacking = ways_to_refuse(chosen_on, measured, words)
        tables += [
            Table(
                f"Harmless requests refused, by kind: {named}",
                ["kind", "levels", "n", "base model", "the run's replies", "its verdict alone"],
                by_kind(found, words),
            ),
            Table(
                f"Thresholds chosen on one half, measured on the other: {named}",
                [
                    *("how it is refused", "threshold", "harmless refused", "of n"),
                    *("attack success", "of n risky", "fewer missed, points"),
                ],
                by_way(ways, measured),
            ),
        ]
        plots.append((f"Operating curve: {named}", operating(ways, measured, words)))
        notes += [f"{named}: {note}" for note in (*findings(ways, measured), *lacking)]
    return Page(
        "Exaggerated safety",
        "Which kinds of harmless requests are refused, and what does a threshold calibrated to a"
        " budget of false refusals buy over the hand-set ones?",
        tables,
        plots,
        notes,
    )


# --- asking --------------------------------------------------------------------------------------


def draw(split: Split, kind: str, count: int, seed: int) -> list[Sample]:
    """Held-out requests of one kind: a name in `KINDS`, or `RISKY`."""
    if kind == RISKY:
        return evaluation_samples(split, "risky", count, seed)
    wanted, rng = KINDS[kind], Random(f"exaggerated/{split}/{kind}/{seed}")
    return [
        draw_sample(
            rng,
            split,
            f"{split}-{kind}-{seed}-{i}",
            rng.choice(world().risk_types) if wanted.risky else None,
            rng.choice(wanted.asked),
            rng.choice(wanted.settings),
            wanted.sign,
            wanted.question,
        )
        for i in range(count)
    ]


def outcomes(model: PsaVlm, base: Method, kind: str, samples: Sequence[Sample]) -> list[Outcome]:
    """Put requests of one kind to a run, under its own policy, and to its base model."""
    judge = Judge.for_policy(model.policy, model.taxonomy)
    found = []
    for start in track(range(0, len(samples), BATCH), f"asking: {kind}"):
        part = samples[start : start + BATCH]
        before = base([Ask(one.images, one.conversation[:1]) for one in part], MAX_NEW_TOKENS)
        after = model.reply_batch(
            [one.images for one in part],
            [one.question for one in part],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for sample, plain, reply in zip(part, before, after, strict=True):
            if reply.verdict is None or reply.verdict.error is not None:
                raise VerdictError(f"sample {sample.id}: not assessed: {reply.decision.reason}")
            (image,) = reply.verdict.images
            found.append(
                Outcome(
                    kind,
                    sample.level or "",
                    judge.is_refusal(plain.written.text),
                    judge.is_refusal(reply.text),
                    dict(image.type_probs),
                    dict(image.level_probs),
                )
            )
    return found


# --- the page ------------------------------------------------------------------------------------


def by_kind(found: Sequence[Outcome], taxonomy: Taxonomy) -> list[list[Cell]]:
    """One row for each kind of harmless request, and one for all of them."""
    table: list[list[Cell]] = []
    groups = {
        kind.words: [one for one in found if one.kind == name] for name, kind in KINDS.items()
    }
    groups["all kinds"] = [one for one in found if not one.risky]
    for words, group in groups.items():
        levels = {one.level for one in group}
        table.append(
            [
                words,
                ", ".join(level for level in taxonomy.levels if level in levels),
                len(group),
                wilson([one.base_refused for one in group]),
                wilson([one.refused for one in group]),
                wilson([likeliest_refused(one.image, taxonomy) for one in group]),
            ]
        )
    return table


def by_way(ways: Sequence[Way], measured: Sequence[Outcome]) -> list[list[Cell]]:
    """One row for each way to refuse."""
    risky = np.array([one.risky for one in measured])
    return [
        [
            way.name,
            way.threshold,
            way.false_refusals(risky),
            int((~risky).sum()),
            way.misses(risky),
            int(risky.sum()),
            None if way is ways[0] else way.saves(ways[0], risky),
        ]
        for way in ways
    ]


def findings(ways: Sequence[Way], measured: Sequence[Outcome]) -> list[str]:
    """What the ways to refuse say in words."""
    risky = np.array([one.risky for one in measured])
    notes = []
    for way in ways[2:]:
        change = way.saves(ways[0], risky)
        if way.name.endswith(SAME_SPEND):
            clear = "" if change.clear else ", which the interval can't tell from none"
            notes.append(f"{way.name}: {told(change)} points fewer missed than hand-set{clear}.")
        for budget in BUDGETS:
            refused = way.false_refusals(risky)
            if way.name.endswith(f"{budget:.0%}") and refused.low > budget:
                notes.append(f"{way.name}: not kept, {told(refused)} of harmless requests refused.")
    return notes
