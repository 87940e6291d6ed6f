"""The testbed under attack: what is attacked, and another training to attack by transfer."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from psa_vlm.evaluation.scorers import Judge
from psa_vlm.inference import PsaVlm
from psa_vlm.model.bottleneck import SafetyBottleneck
from psa_vlm.robustness.trials import Cases
from psa_vlm.testbed.cases import Split, alignment_samples, evaluation_samples
from psa_vlm.training.concepts import train_concepts
from psa_vlm.training.config import Stage1Config, load
from psa_vlm.training.fit import Work

SPLIT: Split = "compositions"
SURROGATE_SAMPLES = 1000
SURROGATE_EPOCHS = 8


def cases(model: PsaVlm, count: int, seed: int) -> Cases:
    """Held-out requests whose harmful answers are known, judged by the replies."""
    return Cases(
        evaluation_samples(SPLIT, "risky", count, seed),
        evaluation_samples(SPLIT, "harmless", count, seed),
        Judge.for_policy(model.policy, model.taxonomy),
        f"the testbed's held-out {SPLIT}, seed {seed}",
    )


def surrogate(model: PsaVlm, seed: int, folder: Path) -> SafetyBottleneck:
    """A bottleneck of another seed: other scenes, other weights, another order.

    Args:
        model: its backbone is shared, as an attacker shares it who trains on the public base model.
        seed: another one than the run's.
        folder: where features and checkpoints are kept.
    """
    recipe = Path(str(files("psa_vlm.testbed").joinpath("assets/stage1.yaml")))
    config = load(recipe, Stage1Config, [f"concepts.epochs={SURROGATE_EPOCHS}"]).concepts
    samples = alignment_samples(SURROGATE_SAMPLES, seed)
    work = Work(folder, seed, report_to=())
    return train_concepts(model.backbone, model.taxonomy, samples, config, work)[0]
