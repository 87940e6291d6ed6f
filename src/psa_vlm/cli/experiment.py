"""Commands that answer a question by many trainings or measurements."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Base, Scale, quiet
from psa_vlm.errors import InputError


def experiment(
    name: Annotated[str, typer.Argument(help="Which; docs/experiments/README.md lists them.")],
    run: Annotated[
        Path | None, typer.Option(help="A run folder, for the experiments that read one.")
    ] = None,
    scale: Annotated[
        Scale, typer.Option(help="small: 15 minutes on two cores; full goes on where it stopped.")
    ] = Scale.small,
    seed: Annotated[int, typer.Option(help="The first, of data and training.")] = 0,
    seeds: Annotated[
        int | None, typer.Option(help="ratio, ablation: how many; default: the scale's.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; default: runs/experiments/NAME.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="slices: a labelled set; default: the testbed's.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="slices: folder of its images.")] = None,
    tag: Annotated[
        str | None, typer.Option(help="slices: the tag of the samples that makes them.")
    ] = None,
    base: Base = None,
) -> None:
    """Run an experiment and write its page: page.html, tables.md and result.json."""
    from psa_vlm.experiments import EXPERIMENTS

    if name not in EXPERIMENTS:
        raise InputError(f"no experiment '{name}'; there are: {', '.join(sorted(EXPERIMENTS))}")

    import time
    from importlib import import_module
    from inspect import signature

    from psa_vlm.experiments.page import write_page

    module = import_module(EXPERIMENTS[name])
    out = out or Path("runs/experiments") / name
    taken = signature(module.run).parameters
    if "run" in taken and run is None:
        raise InputError(f"the experiment {name} reads a run: name one with --run")
    if run is not None and "run" not in taken:
        raise InputError(f"the experiment {name} trains its own runs: leave --run out")
    options = {
        "run": run,
        "base": base,
        "data": data,
        "images": images,
        "tag": tag,
        "seeds": seeds,
    }
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := [option for option in given if option not in taken]:
        raise InputError(f"the experiment {name} has no --{unknown[0]}: leave it out")
    quiet()
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    page = module.run(out, scale.value, seed, **given)
    words = [word for option, value in given.items() for word in (f"--{option}", str(value))]
    command = shlex.join(
        ["psa-vlm", "experiment", name, *words, "--scale", scale.value, "--seed", str(seed)]
    )
    write_page(out, page, command, seed, started)
