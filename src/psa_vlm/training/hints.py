"""The hints of training prompts: what inference would put beside each sample's question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from psa_vlm.data.sample import Sample
from psa_vlm.inference import PsaVlm
from psa_vlm.progress import track
from psa_vlm.training.concepts import verdict_text
from psa_vlm.training.runs import write_json


def saved_hints(
    path: Path, model: PsaVlm, samples: Sequence[Sample], batch: int
) -> list[str | None]:
    """What inference would put beside each sample's question; computed once and kept in a file."""
    if path.exists():
        saved: list[str | None] = json.loads(path.read_text(encoding="utf-8"))
        return saved
    hints: list[str | None] = []
    starts = range(0, len(samples), batch)
    for start in track(starts, "verdicts"):
        hints += hints_for(model, samples[start : start + batch])
    write_json(path, hints)
    return hints


def hints_for(model: PsaVlm, samples: Sequence[Sample]) -> list[str | None]:
    """The hint that the model's own policy gives for its own verdict; None without one."""
    seen = [sample for sample in samples if sample.images]
    verdicts = iter(
        model.assess_batch([s.images for s in seen], [verdict_text(s) for s in seen])
        if seen
        else []
    )
    return [
        model.policy.decide(next(verdicts), model.taxonomy).hint if sample.images else None
        for sample in samples
    ]
