"""The command that assesses many images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from psa_vlm.cli.options import DEMO_RUN, Base, Json, Model, PolicyOption, print_json, quiet
from psa_vlm.errors import PsaVlmError
from psa_vlm.scan import BATCH, ROWS, TEXT, check_extra

if TYPE_CHECKING:
    from rich.table import Table

    from psa_vlm.scan.run import Summary


def scan(
    source: Annotated[
        str,
        typer.Argument(help="A folder, a tar or a Parquet file; a path or a URL as s3://b/photos."),
    ],
    out: Annotated[str, typer.Argument(help="Folder of the result, a path or a URL.")],
    model: Model = DEMO_RUN,
    policy: PolicyOption = None,
    text: Annotated[str, typer.Option(help="The question put to each image.")] = TEXT,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: this machine.")
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(help="Copies of the model; default: one for each GPU, or CPU but one.", min=1),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of Parquet files, the one that holds encoded images.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in one pass of the model.", min=1)] = BATCH,
    rows: Annotated[
        int, typer.Option(help="Image files that are written at a time.", min=1)
    ] = ROWS,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Assess every image of a source into Parquet; the same command goes on after a kill."""
    check_extra()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from psa_vlm.model.checkpoint import home, read_manifest
    from psa_vlm.policy.policy import Policy
    from psa_vlm.scan import run

    quiet()
    read_manifest(model)
    rules = Policy.load(policy) if policy else Policy.from_yaml(home(model) / "policy.yaml")
    job = run.Scan(source, out, model, rules, text, base, column, batch, rows)
    columns = ("scan", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    console = Console(stderr=True)
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None, rate="the actors start")

        def watch(at: run.Progress) -> None:
            rate = f"{at.images:,} images, {at.images / max(at.seconds, 1e-9):.1f}/s"
            bar.update(task, total=at.parts, completed=at.done, rate=rate)

        summary = run.scan(job, address, actors, watch)
    if as_json:
        print_json(_facts(summary))
    else:
        Console().print(_table(summary))
    counts = summary.counts
    if counts.errors == counts.images:
        raise PsaVlmError(f"no image could be assessed; {counts.first_error}")


def _facts(summary: Summary) -> dict[str, object]:
    counts = summary.counts
    return {
        "images": counts.images,
        "errors": counts.errors,
        **{f"{name}s": dict(found) for name, found in counts.by.items()},
        "left_out": summary.left_out,
        "assessed": summary.assessed,
        "seconds": round(summary.seconds, 3),
        "images_per_second": summary.rate and round(summary.rate, 2),
    }


def _table(summary: Summary) -> Table:
    from rich.table import Table

    counts = summary.counts
    table = Table("", "", "images")
    for name, found in counts.by.items():
        for value in sorted(found, key=lambda value: -found[value]):
            table.add_row(name, value, f"{found[value]:,}")
        table.add_section()
    table.add_row(
        "error", f"as in {counts.first_error}" if counts.errors else "", f"{counts.errors:,}"
    )
    table.add_row("in all", "", f"{counts.images:,}")
    if summary.left_out:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in summary.left_out.items())
        table.add_row("left out", f"no images by their names: {kinds}", "")
    if summary.rate is not None:
        table.add_row("assessed now", f"{summary.rate:.1f} images/s", f"{summary.assessed:,}")
    return table
