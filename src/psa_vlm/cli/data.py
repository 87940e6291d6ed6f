"""Commands for data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Config, Images, Json, MapFile, Set, TaxonomyFile, print_json

app = typer.Typer(help="Look at published data sets, and mix them.", no_args_is_help=True)


@app.command("inspect")
def inspect_set(
    path: Annotated[Path, typer.Argument(help="A data file, or the folder of a published set.")],
    images: Images = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="Name of the layout; default: guessed.")
    ] = None,
    map_file: MapFile = None,
    taxonomy: TaxonomyFile = None,
    as_json: Json = False,
) -> None:
    """Count a set, show its labels and three samples, and list each problem: exit code 1 if any."""
    from rich.console import Console

    from psa_vlm.data.inspection import inspect
    from psa_vlm.taxonomy import Taxonomy

    words = Taxonomy.load(taxonomy)
    found = inspect(path, images, words, layout, map_file)
    if as_json:
        print_json(found.to_dict())
    else:
        console = Console()
        console.print(found.view())
        for problem in found.problems:
            typer.echo(problem)
    raise typer.Exit(1 if found.problems else 0)


@app.command("prepare")
def prepare_sets(
    config: Config,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Mix sets into splits that share no image, without copies, balanced as the file says."""
    from rich.console import Console

    from psa_vlm.data.config import PrepareConfig
    from psa_vlm.data.prepare import prepare, table
    from psa_vlm.typed_yaml import load

    manifest = prepare(load(config, PrepareConfig, overrides or []), out)
    if as_json:
        print_json(manifest)
    else:
        Console().print(table(manifest))
        typer.echo(f"written to {out}; what was left out, and why: {out / 'dropped.jsonl'}")
