"""Commands that measure a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import DEMO_RUN, Base, Json, MapFile, Model, load_run, print_json


def evaluate(
    model: Model = DEMO_RUN,
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled set in any known layout; default: the testbed's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    map_file: MapFile = None,
    limit: Annotated[int, typer.Option(help="Requests per cell, or samples.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the testbed's requests.")] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Score a run: attack success, refusal of harmless requests, accuracy, type and level F1."""
    from rich.console import Console

    from psa_vlm.evaluation.evaluate import evaluate_samples

    vlm = load_run(model, base)
    if data is None:
        from psa_vlm.testbed.demo import evaluate_run

        card = evaluate_run(vlm, limit, seed)
        if as_json:
            print_json(card.model_dump(mode="json"))
        else:
            Console().print(card.table())
        return
    from psa_vlm.data.contamination import Seen, contamination
    from psa_vlm.data.readers import read
    from psa_vlm.model.checkpoint import home

    samples = read(data, images, vlm.taxonomy, categories=map_file)[:limit]
    summary = evaluate_samples(vlm, samples)
    seen = Seen.load(home(model))
    shared = None if seen is None else contamination(samples, seen)
    if as_json:
        print_json(summary.to_dict() | {"contamination": shared and shared.to_dict()})
    else:
        Console().print(summary.table())
        typer.echo(
            shared or f"contamination: unknown, {model} does not hold what it was trained on"
        )


def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder; calibration.json is put into it.")],
    data: Annotated[Path, typer.Option(help="Labelled samples that no training saw.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
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
