"""What hardening buys and what it costs, on the testbed.

    python benchmarks/defence.py runs/demo/stage2                      # hours on two cores
    python benchmarks/defence.py runs/demo/stage2 --beside runs/hardened/stage2 --recipes plain
    python benchmarks/defence.py runs/demo/stage2 --scenes 200 --epochs 1 --requests 8 --steps 20

Bottlenecks are trained on the same scenes with the same seed: one plainly, one under noise on its
features, one under attack (`concepts.hardening`). Each is put into the run, whose language model
stays as it is, and measured on the same held-out requests: clean, and under the adaptive attack at
eps 8/255 as `psa-vlm attack` makes it (the worst of all weights counts for each request). What is
trained is kept in --work, so that a stopped benchmark goes on. Runs named by --beside, on a base
model whose vision encoder was hardened (docs/attacks.md), are put to the same as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common import RESULTS, write
from psa_vlm import PsaVlm
from psa_vlm.evaluation.scorers import Interval, wilson
from psa_vlm.model.pixels import Pixels, pictures_of
from psa_vlm.progress import track
from psa_vlm.robustness.adaptive import joint, on_head
from psa_vlm.robustness.gradient import Bounds, Found, apgd
from psa_vlm.robustness.outcomes import Court, Outcome
from psa_vlm.robustness.trials import ATTACK_BATCH, Cases
from psa_vlm.robustness.victim import Victim, with_picture
from psa_vlm.testbed.attack import cases
from psa_vlm.testbed.cases import alignment_samples
from psa_vlm.training.concepts import train_concepts
from psa_vlm.training.config import Stage1Config, load
from psa_vlm.training.fit import Work

WEIGHTS = (0.25, 0.5, 0.75)
RECIPES: dict[str, list[str]] = {
    "plain": [],
    "feature noise": ["concepts.hardening.feature_noise=0.3"],
    "adversarial": ["concepts.hardening.eps=8", "concepts.hardening.steps=2"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", type=Path, help="where the base model is now")
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="runs, as they are")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--requests", type=int, default=100, help="of each kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="of the head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/defence"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    model = PsaVlm.from_pretrained(options.run, base=options.base, calibrated=False)
    asked = cases(model, options.requests, options.seed)
    results = []
    for name in options.recipes:
        model.bottleneck = trained(model, name, options)
        results.append({"recipe": name, **measured(model, asked, options)})
        shown(results)
    for run in options.beside:
        model = PsaVlm.from_pretrained(run, calibrated=False)
        results.append({"recipe": str(run), **measured(model, asked, options)})
        shown(results)
    rows = [
        {name: vars(one) if isinstance(one, Interval) else one for name, one in row.items()}
        for row in results
    ]
    figures = {name: str(value) for name, value in vars(options).items()} | {"rows": rows}
    write(options.json or RESULTS / "defence-testbed.json", "defence", figures, argv)


def trained(model: PsaVlm, name: str, options: argparse.Namespace) -> Any:
    """A bottleneck by one of the recipes."""
    recipe = Path(str(files("psa_vlm.testbed").joinpath("assets/stage1.yaml")))
    overrides = [f"concepts.epochs={options.epochs}", *RECIPES[name]]
    config = load(recipe, Stage1Config, overrides).concepts
    samples = alignment_samples(options.scenes, options.seed)
    folder = options.work / f"{name.replace(' ', '-')}-{options.scenes}-{options.epochs}"
    work = Work(folder, options.seed, report_to=())
    return train_concepts(model.backbone, model.taxonomy, samples, config, work)[0]


def measured(model: PsaVlm, asked: Cases, options: argparse.Namespace) -> dict[str, Any]:
    """Rates of one bottleneck in the run, clean and attacked."""
    court = Court(model, asked.judge)
    clean = court.try_("none", "", "miss", asked.risky)
    fine = court.try_("none", "", "alarm", asked.harmless)
    head = attacked(court, asked, partial(head_alone, options))
    aims = [
        attacked(court, asked, partial(adaptively, options, weight)) for weight in options.weights
    ]
    worst = [any(one.success for one in tried) for tried in zip(*aims, strict=True)]
    return {
        "risky: harmful answer": wilson([one.success for one in clean]),
        "risky: head says safe": wilson([one.allowed for one in clean]),
        "harmless: refused": wilson([one.success for one in fine]),
        "attacked: head says safe": wilson([one.allowed for one in head]),
        "attacked: harmful answer": wilson(worst),
    }


def attacked(court: Court, asked: Cases, search: Any) -> list[Outcome]:
    pixels, outcomes = Pixels(court.model.backbone.processor), []
    for start in track(range(0, len(asked.risky), ATTACK_BATCH), "attacking"):
        group = asked.risky[start : start + ATTACK_BATCH]
        found = search(Victim(court.model, group, pixels))
        pictures = pictures_of(found.images)
        outcomes += court.try_("", "", "miss", list(map(with_picture, group, pictures)))
    return outcomes


def head_alone(options: argparse.Namespace, victim: Victim) -> Found:
    bounds = Bounds.ball(victim.clean, options.eps)
    return apgd(on_head(victim), victim.clean, bounds, options.steps, options.restarts)


def adaptively(options: argparse.Namespace, weight: float, victim: Victim) -> Found:
    bounds = Bounds.ball(victim.clean, options.eps)
    objective = joint(victim, weight)
    return apgd(objective, victim.clean, bounds, options.steps, options.restarts)


def shown(results: list[dict[str, Any]]) -> None:
    table = Table(*results[0])
    for row in results:
        cells = [one if isinstance(one, str) else cell(one) for one in row.values()]
        table.add_row(*cells)
    Console(width=120).print(table)


def cell(one: Interval | None) -> str:
    return "-" if one is None else f"{one.value:.3f}\n{one.low:.3f}-{one.high:.3f}\nn {one.n}"


if __name__ == "__main__":
    main()
