"""The command that scores a run, or with Inspect any model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psa_vlm.cli.options import (
    DEMO_RUN,
    Base,
    Images,
    Json,
    MapFile,
    PolicyOption,
    load_run,
    print_json,
    quiet,
    wide_enough,
)
from psa_vlm.errors import InputError

if TYPE_CHECKING:
    from psa_vlm.evaluation.results import Results

LOGS = Path("runs/evaluations")
"""Where the logs of evaluations go."""
REQUESTS = 200
"""Of each cell of the testbed, or of a set, where no limit is given."""


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
    images: Images = None,
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
    given = {"--baseline": baseline, "--policy": policy, "--judge": judge, "--batch": batch}
    if unused := next((name for name, value in given.items() if value is not None), None):
        raise InputError(f"{unused} is for --task; name one")
    if data is None:
        _on_testbed(Path(model), base, limit or REQUESTS, seed, as_json)
    else:
        _on_labelled(Path(model), base, (data, images, map_file), limit or REQUESTS, as_json)


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
        samples = testbed.requests(asked["limit"] or REQUESTS, asked["seed"])
        asked["limit"], longest = None, testbed.MAX_TOKENS
    else:
        benchmark = benchmark_named(name)
        samples, longest = benchmark.read(*files), benchmark.max_tokens
    vlm = model_named(model, **chosen)
    results, _ = run(name, samples, vlm, Asked(**asked), logs, longest, str(files[0] or ""))
    return results


def _on_testbed(run: Path, base: Path | None, limit: int, seed: int, as_json: bool) -> None:
    from rich.console import Console

    from psa_vlm.testbed.demo import evaluate_run

    card = evaluate_run(load_run(run, base), limit, seed)
    if as_json:
        print_json(card.model_dump(mode="json"))
    else:
        Console().print(card.table())


def _on_labelled(
    run: Path,
    base: Path | None,
    files: tuple[Path, Path | None, Path | None],
    limit: int,
    as_json: bool,
) -> None:
    from rich.console import Console

    from psa_vlm.data.contamination import Fingerprints, contamination
    from psa_vlm.data.readers import read
    from psa_vlm.evaluation.evaluate import evaluate_samples
    from psa_vlm.model.checkpoint import home

    data, images, map_file = files
    vlm = load_run(run, base)
    samples = read(data, images, vlm.taxonomy, categories=map_file)[:limit]
    summary = evaluate_samples(vlm, samples)
    seen = Fingerprints.load(home(run))
    shared = None if seen is None else contamination(samples, seen)
    if as_json:
        print_json(summary.to_dict() | {"contamination": shared and shared.to_dict()})
    else:
        Console().print(summary.table())
        typer.echo(shared or f"contamination: unknown, {run} does not hold what it was trained on")
