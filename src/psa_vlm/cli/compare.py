"""Commands that compare evaluations, by tests and by people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Json, print_json, wide_enough

app = typer.Typer(help="Blind human A/B of two evaluations.", no_args_is_help=True)

LogFile = Annotated[Path, typer.Argument(help="A log of an evaluation, or a folder: its latest.")]


def compare(
    logs: Annotated[
        list[Path], typer.Argument(help="Logs of one task; of a folder, the latest counts.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write a page with plots and replies.")] = None,
    seed: Annotated[int, typer.Option(help="Of permutation tests and of what is shown.")] = 0,
    as_json: Json = False,
) -> None:
    """Evaluations side by side, with paired tests; a page shows the replies that differ."""
    from psa_vlm.evaluation.compare import compare as run
    from psa_vlm.evaluation.compare import disagreements, write_comparison
    from psa_vlm.evaluation.outcomes import read_log

    read = [read_log(path) for path in logs]
    comparison = run(read, seed)
    if out is not None:
        command = f"psa-vlm compare {' '.join(map(str, logs))} --seed {seed}"
        write_comparison(out, comparison, disagreements(read, seed), command)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
    else:
        wide_enough().print(comparison.table())
        if out is not None:
            typer.echo(f"page: {out}")


@app.command()
def serve(
    first: LogFile,
    second: LogFile,
    ratings: Annotated[Path, typer.Option(help="SQLite file of what raters say.")] = Path(
        "ratings.sqlite"
    ),
    limit: Annotated[int | None, typer.Option(help="Most requests.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, the order and the sides.")] = 0,
    host: Annotated[str, typer.Option(help="To listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="To listen on.")] = 8010,
) -> None:
    """Show two anonymous answers to each request, and keep which is better."""
    from psa_vlm.errors import MissingExtra
    from psa_vlm.evaluation.ab import Ratings, pairs
    from psa_vlm.evaluation.ab import app as page
    from psa_vlm.evaluation.outcomes import method_of, read_log

    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtra("uvicorn", "serve") from error
    logs = [read_log(first), read_log(second)]
    a, b = (f"{log.eval.model} ({method_of(log)}), {Path(log.location).name}" for log in logs)
    shown = pairs(logs[0], logs[1], limit, seed)
    web = page(shown, Ratings(ratings, (a, b)), seed)
    typer.echo(f"{len(shown)} requests at http://{host}:{port}; results: psa-vlm ab results")
    uvicorn.run(web, host=host, port=port, log_level="warning")


@app.command()
def results(
    ratings: Annotated[Path, typer.Argument(help="SQLite file of what raters said.")] = Path(
        "ratings.sqlite"
    ),
    as_json: Json = False,
) -> None:
    """Wins, ties and losses by rater, and how far raters agree."""
    from psa_vlm.evaluation.ab import Ratings

    summary = Ratings(ratings).summary()
    if as_json:
        print_json(summary.model_dump(mode="json"))
    else:
        wide_enough().print(summary.table())
