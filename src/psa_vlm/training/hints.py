"""The hints of training prompts: what inference would put beside each sample's question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from psa_vlm.data.sample import Sample
from psa_vlm.inference import PsaVlm
from psa_vlm.model.verdict import Verdict
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import verdict_text
from psa_vlm.training.runs import write_json


def saved_hints(
    path: Path,
    model: PsaVlm,
    samples: Sequence[Sample],
    batch: int,
    misstated: float = 0.0,
    seed: int = 0,
) -> list[str | None]:
    """The hints of all samples; computed once and kept in a file. See `hints_for`."""
    if path.exists():
        saved: list[str | None] = json.loads(path.read_text(encoding="utf-8"))
        return saved
    rng = Random(seed)
    hints: list[str | None] = []
    starts = range(0, len(samples), batch)
    for start in track(starts, "verdicts"):
        hints += hints_for(model, samples[start : start + batch], misstated, rng)
    write_json(path, hints)
    return hints


def hints_for(
    model: PsaVlm, samples: Sequence[Sample], misstated: float = 0.0, rng: Random | None = None
) -> list[str | None]:
    """The hint that the model's own policy gives for its own verdict; None without one.

    Args:
        model: gives verdicts.
        samples: those without an image have no hint.
        misstated: about this share of the verdicts is taken at another level: see `misstate`.
        rng: draws which, and the level.
    """
    rng = rng or Random(0)
    seen = [sample for sample in samples if sample.images]
    verdicts = iter(
        model.assess_batch([s.images for s in seen], [verdict_text(s) for s in seen])
        if seen
        else []
    )
    hints: list[str | None] = []
    for sample in samples:
        if not sample.images:
            hints.append(None)
            continue
        verdict = next(verdicts)
        if rng.random() < misstated:
            verdict = misstate(verdict, model.taxonomy, rng)
        hints.append(model.policy.decide(verdict, model.taxonomy).hint)
    return hints


def misstate(verdict: Verdict, taxonomy: Taxonomy, rng: Random) -> Verdict:
    """The verdict with each risky concept at another level, drawn evenly from all but the highest.

    The highest level is never a lie, so that the words for it can always be trusted.
    """
    other = {
        name: rng.choice([one for one in taxonomy.levels[:-1] if one != level])
        for name, level in verdict.concepts.items()
        if level != taxonomy.safe_level
    }
    return verdict.override(other, taxonomy)
