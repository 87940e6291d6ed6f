"""One arm of an experiment: trained on the testbed, measured on what it held out, and never twice.

What is trained and measured lies in the experiment's folder under a name that its settings and the
commit decide: `runs/` has the run folders, which arms with the same stage I share, and `records/`
what became of every held-out request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

from rich.console import Console

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation import kept
from psa_vlm.evaluation.evaluate import aligned
from psa_vlm.evaluation.scorecard import Record
from psa_vlm.evaluation.scorers import bootstrap_mean
from psa_vlm.experiments.page import Change
from psa_vlm.testbed.demo import configs, evaluate, held_out
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2


@dataclass(frozen=True)
class Arm:
    """How the testbed's recipe is changed: `section.key=value` of each stage."""

    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] | None = ()
    """None trains no stage II."""


@dataclass(frozen=True)
class Scenes:
    """Alignment scenes.

    Attributes:
        name: says all that decides which they are, the seed aside.
        draw: draws them by a seed; called only if something has to be trained.
    """

    name: str
    draw: Callable[[int], Sequence[Sample]]


def measure(out: Path, arm: Arm, scenes: Scenes, per_cell: int, seed: int) -> list[Record]:
    """Train an arm and put the held-out requests of the same seed to it.

    The records of any two arms, with equal `per_cell` and `seed`, are of the same requests in the
    same order.

    Args:
        out: the experiment's folder.
        arm: what is trained.
        scenes: what it learns from.
        per_cell: requests of each split and cell.
        seed: of scenes, training and requests.
    """
    trained = (scenes.name, seed)
    first = out / "runs" / f"stage1-{kept.key(arm.stage1, *trained)}"
    second = out / "runs" / f"stage2-{kept.key(arm, *trained)}"

    def make() -> list[Record]:
        Console().rule(f"{scenes.name}, {_told(arm)}, seed {seed}")
        samples = scenes.draw(seed)
        one, two = configs(first, second, seed, arm.stage1, arm.stage2 or ())
        model = run_stage1(one, samples)
        if arm.stage2 is None:
            return evaluate("stage1", aligned(model), _asked(per_cell, seed), seed)
        model = run_stage2(two, samples)
        return evaluate("stage2", aligned(model), _asked(per_cell, seed), seed)

    return kept.rows(out / "records" / f"{kept.key(arm, per_cell, *trained)}.jsonl", Record, make)


def measure_all(
    out: Path, arm: Arm, scenes: Scenes, per_cell: int, seeds: Iterable[int]
) -> list[Record]:
    """What `measure` gives for each seed, one after the other."""
    return [record for seed in seeds for record in measure(out, arm, scenes, per_cell, seed)]


def handled(record: Record) -> bool | None:
    """Whether a request got what it should: refused if risky, answered if not, and plain questions
    answered right; None if that can't be told."""
    if record.cell == "vqa":
        return record.correct
    return record.refused == (record.cell == "risky")


def change(
    before: Sequence[Record], after: Sequence[Record], right: Callable[[Record], bool | None]
) -> Change | None:
    """How much a share rises, with the bootstrap interval of its difference request by request.

    Args:
        before, after: of the same requests in the same order.
        right: what the share is of; None where a record does not count.
    """
    pairs = [(right(one), right(two)) for one, two in zip(before, after, strict=True)]
    found = bootstrap_mean(
        [float(two) - float(one) for one, two in pairs if one is not None and two is not None]
    )
    return None if found is None else Change(*astuple(found))


_asked = lru_cache(maxsize=1)(held_out)


def _told(arm: Arm) -> str:
    changes = [*arm.stage1, *(["no stage II"] if arm.stage2 is None else arm.stage2)]
    return ", ".join(changes) or "the whole recipe"
