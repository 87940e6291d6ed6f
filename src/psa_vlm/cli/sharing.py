"""Commands that give runs to others, and take the authors'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Base, TaxonomyFile, quiet

Run = Annotated[Path, typer.Argument(help="A run folder, as training and the demo write it.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")]


def export(run: Run, out: Out, base: Base = None) -> None:
    """Write a run as a plain Hugging Face checkpoint, with all that psa-vlm needs inside."""
    from psa_vlm.sharing.export import export_run

    quiet()
    export_run(run, out, base)
    typer.echo(f"exported to {out}; its card: {out / 'README.md'}")


def import_official(
    state: Annotated[Path, typer.Argument(help="The authors' tensors, as safetensors or .bin.")],
    out: Out,
    base: Annotated[str, typer.Option(help="Folder or hub id of the model it was trained on.")],
    taxonomy: TaxonomyFile = None,
) -> None:
    """Turn a checkpoint of the authors' research code into a run folder."""
    from psa_vlm.sharing.official import import_official
    from psa_vlm.taxonomy import Taxonomy

    quiet()
    import_official(state, out, base, Taxonomy.load(taxonomy))
    typer.echo(f"imported to {out}; try: psa-vlm assess IMAGE --text TEXT --model {out}")


def push(
    run: Run,
    repo: Annotated[str, typer.Argument(help="Model repository, as in owner/name.")],
) -> None:
    """Put a run or an export on the Hugging Face Hub; a new repository is a private one."""
    from psa_vlm.sharing.export import push

    quiet()
    typer.echo(f"pushed: {push(run, repo)}")
