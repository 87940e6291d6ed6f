"""Commands of the embedded small world, and its demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Json, Scale, quiet

app = typer.Typer(help="The embedded small world and its base model.", no_args_is_help=True)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, scorecard and runs.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    scale: Annotated[Scale, typer.Option(help="full: three seeds, 2,000 requests per cell.")] = (
        Scale.small
    ),
) -> None:
    """Align the small model before your eyes and compare it with its rivals."""
    from psa_vlm.testbed.demo import run_demo

    quiet()
    run_demo(out, seed, scale.value)


@app.command("build-base")
def build_base(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")] = Path("runs/base"),
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train the base model from nothing (under two hours on two cores) and measure the premise."""
    from psa_vlm.testbed.base_vlm import Steps, build_base

    quiet()
    build_base(out, Steps(), seed)
    premise(out)


@app.command()
def premise(
    base: Annotated[Path | None, typer.Option(help="A base model; default: the shipped.")] = None,
    count: Annotated[int, typer.Option(help="Held-out requests of each kind.", min=1)] = 1000,
    as_json: Json = False,
) -> None:
    """Measure the hole: refused in words, answered when the risky thing is in the image."""
    from psa_vlm.testbed.premise import report

    quiet()
    report(base, count, as_json)


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder for images and samples.jsonl.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
) -> None:
    """Write labelled alignment scenes in the authors' format, ready for `train`."""
    from psa_vlm.testbed.cases import write_samples

    path = write_samples(out, count, seed)
    typer.echo(f"wrote {count} samples to {path}")


@app.command("build-sprites")
def build_sprites(
    noto_font: Annotated[Path, typer.Argument(help="NotoColorEmoji.ttf")],
    twemoji: Annotated[Path, typer.Argument(help="Folder of Twemoji SVGs.")],
    fluent: Annotated[Path, typer.Argument(help="Folder of flat Fluent SVGs.")],
    out: Annotated[Path, typer.Argument(help="Folder for the atlases.")],
) -> None:
    """Draw the pictograph atlases anew from their openly licensed originals."""
    from psa_vlm.testbed.sprites import render_atlases

    for path in render_atlases(noto_font, twemoji, fluent, out):
        typer.echo(str(path))
