"""Commands that measure a run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psa_vlm.cli.options import (
    DEMO_RUN,
    Base,
    Json,
    MapFile,
    PolicyOption,
    load_run,
    named_policy,
    print_json,
    quiet,
    wide_enough,
)
from psa_vlm.errors import InputError

if TYPE_CHECKING:
    from psa_vlm.evaluation.results import Results

LOGS = Path("runs/evaluations")
"""Where the logs of evaluations go."""


class SuiteName(StrEnum):
    """Sets of attacks."""

    standard = "standard"


class Scale(StrEnum):
    """How much is tried."""

    small = "small"
    full = "full"


def evaluate(
    model: Annotated[
        str,
        typer.Option(
            help="A run folder; with --task also a baseline's, a checkpoint's, a model of Inspect's"
            " (openai/gpt-4o), or the URL of a service (http://localhost:8000/v1#name)."
        ),
    ] = str(DEMO_RUN),
    task: Annotated[
        str | None, typer.Option(help="A benchmark, as in figstep; see docs/evaluation.md.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The task's folder, or a labelled set in any known layout."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    map_file: MapFile = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Requests: of each cell of the testbed (200), of a set, or of a task (all).",
            min=1,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the testbed's requests, of draws.")] = 0,
    base: Base = None,
    baseline: Annotated[
        str | None, typer.Option(help="With --task: plain, system_prompt, adashield or ecso.")
    ] = None,
    policy: PolicyOption = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="With --task: phrases, rules, or a model of Inspect's. Repeat it."),
    ] = None,
    judge_images: Annotated[
        bool, typer.Option(help="With --task: show the images to a model as judge.")
    ] = True,
    epochs: Annotated[int, typer.Option(help="With --task: ask so often.", min=1)] = 1,
    retries: Annotated[int, typer.Option(help="With --task: of a failed request.", min=0)] = 0,
    cache: Annotated[bool, typer.Option(help="With --task: keep replies.")] = False,
    batch: Annotated[int | None, typer.Option(help="With --task: at a time.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="With --task: as in cuda.")] = None,
    logs: Annotated[Path, typer.Option(help="With --task: folder for Inspect's log.")] = LOGS,
    as_json: Json = False,
) -> None:
    """Score a run: attack success, refusal of harmless requests, accuracy, type and level F1.

    With --task, score any model on a published benchmark or the testbed, with Inspect.
    """
    from rich.console import Console

    if task is not None:
        chosen = {"baseline": baseline, "policy": policy, "batch": batch, "device": device}
        chosen["base"] = None if base is None else str(base)
        results = _on_task(
            task,
            model,
            chosen,
            (data, images, map_file),
            logs,
            judges=tuple(judge or ("phrases", "rules")),
            limit=limit,
            epochs=epochs,
            retries=retries,
            cache=cache,
            seed=seed,
            images_to_judges=judge_images,
            display="none" if as_json else "rich" if Console().is_terminal else "plain",
        )
        if as_json:
            print_json(results.model_dump(mode="json"))
        else:
            wide_enough().print(results.table())
            typer.echo(f"log: {results.log}   view: inspect view --log-dir {logs}")
        return

    from psa_vlm.evaluation.evaluate import evaluate_samples

    given = {"--baseline": baseline, "--policy": policy, "--judge": judge, "--batch": batch}
    if unused := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"{unused} is for --task; name one")
    run, limit = Path(model), limit or 200
    vlm = load_run(run, base)
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
    seen = Seen.load(home(run))
    shared = None if seen is None else contamination(samples, seen)
    if as_json:
        print_json(summary.to_dict() | {"contamination": shared and shared.to_dict()})
    else:
        Console().print(summary.table())
        typer.echo(
            shared or f"contamination: unknown, {model} does not hold what it was trained on"
        )


def _on_task(
    name: str,
    model: str,
    chosen: dict[str, Any],
    files: tuple[Path | None, Path | None, Path | None],
    logs: Path,
    **asked: Any,
) -> Results:
    from psa_vlm.evaluation.running import Asked, model_named
    from psa_vlm.evaluation.running import evaluate as run
    from psa_vlm.evaluation.tasks import benchmark_named
    from psa_vlm.testbed import task as testbed

    quiet()
    if name == testbed.NAME:
        samples = testbed.requests(asked["limit"] or 200, asked["seed"])
        asked["limit"], longest = None, testbed.MAX_TOKENS
    else:
        benchmark = benchmark_named(name)
        samples, longest = benchmark.read(*files), benchmark.max_tokens
    vlm = model_named(model, **chosen)
    results, _ = run(name, samples, vlm, Asked(**asked), logs, longest, str(files[0] or ""))
    return results


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


def attack(
    run: Annotated[Path, typer.Argument(help="A run folder.")] = DEMO_RUN,
    suite: Annotated[SuiteName, typer.Option(help="Which attacks.")] = SuiteName.standard,
    scale: Annotated[
        Scale, typer.Option(help="small: 15 minutes on two cores; full goes on where it stopped.")
    ] = Scale.small,
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled set in any known layout; default: the testbed's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
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
    run: Annotated[Path, typer.Argument(help="A run folder.")] = DEMO_RUN,
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled set in any known layout; default: the testbed's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
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
