"""Stage II, safety alignment: the language model learns to answer beside the hints it will see."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from psa_vlm.data.sample import Sample
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import verdict_text
from psa_vlm.training.config import Stage2Config
from psa_vlm.training.language import dialogues, train_lora
from psa_vlm.training.processes import device, main_first
from psa_vlm.training.runs import Run, backbone_dtype, read_samples, write_json


def run_stage2(config: Stage2Config, samples: Sequence[Sample] | None = None) -> PsaVlm:
    """Train stage II on a run of stage I, or go on with it, and write the run folder `config.out`.

    Args:
        config: what to do.
        samples: answered; None reads `config.data`.

    Returns:
        The aligned model, its adapter merged.

    Raises:
        ConfigError: a path of the configuration is wrong, or `out` holds another run.
        DataError: samples can't be used.
        CheckpointError: the run of stage I can't be read, or a checkpoint can't be written.
    """
    dtype = backbone_dtype(config)
    if samples is None:
        samples = read_samples(config, Taxonomy.from_yaml(config.model / "taxonomy.yaml"))
    dialogues(samples)  # what is missing shows before anything is loaded
    run = Run(2, config, samples)
    if run.finished:
        run.clean()
        return PsaVlm.from_pretrained(run.out, dtype=dtype, device=device())
    model = PsaVlm.from_pretrained(config.model, dtype=dtype, device=device())
    if config.policy:
        model.policy = Policy.from_yaml(config.policy)
        model.policy.check(model.taxonomy)
    work = run.work("lora")
    with main_first():
        hints = saved_hints(work.folder / "hints.json", model, samples, config.assess_batch)
    hints = withhold(hints, config.hint_dropout, config.seed)
    model.adapter, history = train_lora(
        model.backbone, dialogues(samples, hints), config.lora, work
    )
    model.adapter.merge_adapter()
    run.finish(model, {"lora": history})
    return model


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


def withhold(hints: Sequence[str | None], share: float, seed: int) -> list[str | None]:
    """Take away about this share of the hints, drawn from the seed."""
    rng = Random(seed)
    return [None if rng.random() < share else hint for hint in hints]
