"""Commands that calibrate a run, attack it, and test its explanations."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import (
    DEMO_RUN,
    Base,
    Images,
    Json,
    MapFile,
    PolicyOption,
    Run,
    Scale,
    TestSet,
    load_run,
    named_policy,
    print_json,
)


class SuiteName(StrEnum):
    """Sets of attacks."""

    standard = "standard"


def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder; calibration.json is put into it.")],
    data: Annotated[Path, typer.Option(help="Labelled samples that no training saw.")],
    images: Images = None,
    miss_rate: Annotated[float, typer.Option(help="Most missed of each type.")] = 0.01,
    false_refusal: Annotated[
        float, typer.Option(help="Most harmless requests that are called surely risky.")
    ] = 0.05,
    confidence: Annotated[float, typer.Option(help="That each of these holds.")] = 0.95,
    valid_days: Annotated[int, typer.Option(help="Until it should be done again.", min=1)] = 90,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Make a run's probabilities honest, and choose thresholds under a stated bound."""
    from rich.console import Console

    from psa_vlm.data.readers import read
    from psa_vlm.evaluation.calibrate import Promise
    from psa_vlm.evaluation.calibrate import calibrate as fit
    from psa_vlm.evaluation.calibration_report import table, write_calibration
    from psa_vlm.model.calibration import FILE
    from psa_vlm.model.checkpoint import home
    from psa_vlm.sharing.card import write_card

    promise = Promise(miss_rate, false_refusal, confidence)
    vlm = load_run(run, base, calibrated=False)
    calibration = fit(vlm, read(data, images, vlm.taxonomy), promise, valid_days)
    calibration.save(home(run) / FILE)
    page = home(run) / "calibration.html"
    write_calibration(page, calibration, vlm.taxonomy, run)
    write_card(run)
    if as_json:
        print_json(calibration.model_dump(mode="json"))
    else:
        Console().print(table(calibration, vlm.taxonomy))
        Console().print(f"calibration: {home(run) / FILE}   report: {page}")


def attack(
    run: Run = DEMO_RUN,
    suite: Annotated[SuiteName, typer.Option(help="Which attacks.")] = SuiteName.standard,
    scale: Annotated[
        Scale, typer.Option(help="small: 15 minutes on two cores; full goes on where it stopped.")
    ] = Scale.small,
    data: TestSet = None,
    images: Images = None,
    map_file: MapFile = None,
    policy: PolicyOption = None,
    surrogate: Annotated[
        Path | None, typer.Option(help="Another run on the same base model, to attack by transfer.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and what it rests on.")] = Path(
        "runs/attack"
    ),
    seed: Annotated[int, typer.Option(help="Of the testbed's requests and all attacks.")] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Attack a run: corrupted images, words, patches, gradients, and all of it adaptively."""
    from dataclasses import replace
    from functools import partial

    from rich.console import Console

    from psa_vlm.robustness.suite import run_suite
    from psa_vlm.robustness.trials import PLANS, Cases
    from psa_vlm.robustness.victim import other_bottleneck

    vlm = load_run(run, base)
    vlm.policy = named_policy(policy) or vlm.policy
    vlm.policy.check(vlm.taxonomy)
    plan = replace(PLANS[scale.value], seed=seed)
    other = None if surrogate is None else partial(other_bottleneck, vlm, surrogate, base)
    if data is None:
        from psa_vlm.testbed import attack as testbed

        cases = testbed.cases(vlm, plan.samples, seed)
        other = other or partial(testbed.surrogate, vlm, seed + 1, out / "surrogate")
    else:
        from psa_vlm.data.readers import read

        samples = read(data, images, vlm.taxonomy, categories=map_file)
        cases = Cases.of_labelled(samples, vlm, str(data))
    results = run_suite(vlm, cases, plan, out, str(run), other)
    results.save(out / "attack.json")
    command = f"psa-vlm attack {run} --suite {suite.value} --scale {scale.value} --seed {seed}"
    results.write(out / "attack.html", command)
    if as_json:
        print_json(results.model_dump(mode="json"))
    else:
        Console().print(results.table())
        Console().print(f"report: {out / 'attack.html'}   figures: {out / 'attack.json'}")


def faithfulness(
    run: Run = DEMO_RUN,
    data: TestSet = None,
    images: Images = None,
    map_file: MapFile = None,
    limit: Annotated[int, typer.Option(help="Requests of each kind, or samples.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Of the testbed's requests and random maps.")] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Test explanations: is the evidence where the risk is, and does the right concept repair?"""
    from dataclasses import asdict

    from rich.console import Console

    from psa_vlm.evaluation.faithfulness import explain, intervene

    vlm = load_run(run, base)
    if data is None:
        from psa_vlm.testbed.cases import CELLS, evaluation_samples

        samples = [
            sample
            for cell in CELLS
            for sample in evaluation_samples("compositions", cell, limit, seed)
        ]
    else:
        from psa_vlm.data.readers import read

        samples = read(data, images, vlm.taxonomy, categories=map_file)[:limit]
    found, changed = explain(vlm, samples, seed), intervene(vlm, samples)
    if as_json:
        print_json({"evidence": asdict(found), "interventions": asdict(changed)})
    else:
        Console().print(found.table())
        Console().print(changed.table())
